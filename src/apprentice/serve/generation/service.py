"""Answers to requests: through the engine and back, whole or as server-sent events, in OpenAI's shape."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from apprentice.serve.api.accounts import Account
from apprentice.serve.api.outcomes import LEFT, status_of, told
from apprentice.serve.api.schemas import (
    LAST_EVENT,
    Asked,
    ChatRequest,
    CompletionRequest,
    Ids,
    InstructRequest,
    Replies,
    RequestProblem,
    Usage,
    event,
)
from apprentice.serve.engines.base import Request, TokenStream
from apprentice.serve.generation.grammar import Forms
from apprentice.serve.generation.logprobs import of_chat, of_completion
from apprentice.serve.generation.prompts import Phrasing
from apprentice.serve.generation.served_models import Model
from apprentice.serve.generation.streams import Piece, Placed, Reply, side_by_side, usage_of

_CHOICES_AT_ONCE = 8  # choices of one question that are scored at a time, so that it does not fill the engine


class Answering:
    """Answers requests with `model`, each until the deadline of its account."""

    def __init__(self, model: Model) -> None:
        self.phrasing = Phrasing(model.layout, model.engine.context, model.engine.vocabulary)
        self.rank_by = model.contract.rank_by if model.contract is not None else "sum"
        self._engine = model.engine
        self._adapter = model.adapter
        self._layout = model.layout
        self._model_name = model.name
        self._forms = Forms(model.layout)

    def requests(self, asked: Asked) -> list[Request]:
        """Requests to the engine that `asked` becomes: `n` for each prompt. Raises `RequestProblem`."""
        if isinstance(asked, ChatRequest):
            return self.phrasing.chat(asked)
        if isinstance(asked, InstructRequest):
            return self.phrasing.instruct(asked)
        assert isinstance(asked, CompletionRequest)
        return self.phrasing.completion(asked)

    async def answer(self, asked: Asked, requests: list[Request], account: Account) -> Response:
        """Response to `asked`, whole or as a stream; `requests` is what `self.requests(asked)` gave.

        Closes `account` at the end, if the engine has accepted the requests. Raises `RequestProblem`, `Overloaded` or
        `EngineFailed` before the response begins; a later error of a stream is sent as an event.
        """
        requests = await self._formed(asked, requests)
        prompts = len(requests) // asked.n
        read = sum(len(request.prompt) for request in requests[:: asked.n])
        await account.reserve(read + sum(request.max_tokens for request in requests))
        replies = self._begin(asked, requests, account.deadline)
        pieces = side_by_side(replies)
        first: float | None = None

        async def ended(status: int) -> None:
            await pieces.aclose()
            for reply in replies:
                reply.stream.close()
            account.close(usage_of(replies, prompts), first, status)

        try:
            if asked.stream:
                opening = await anext(pieces)
                first = time.perf_counter()
                ending = _Ending()
                events = self._events(asked, replies, opening, pieces, prompts, ending)
                return _EventStream(events, lambda: ended(ending.status))
            gathered = [Piece("", [], []) for _ in replies]
            async with aclosing(pieces):
                async for reply, piece in pieces:
                    first = first or time.perf_counter()
                    gathered[reply.index].text += piece.text
                    gathered[reply.index].scores += piece.scores
        except BaseException as error:
            await ended(status_of(error))
            raise
        await ended(200)
        bodies = Replies(self._model_name, chat=isinstance(asked, ChatRequest))
        choices = [
            bodies.choice(
                reply.index,
                whole.text,
                reply.finish,
                self._scores(asked, whole.scores),
                Ids(reply.request.prompt, reply.ids) if asked.return_token_ids else None,
            )
            for reply, whole in zip(replies, gathered, strict=True)
        ]
        return JSONResponse(bodies.whole(choices, usage_of(replies, prompts)))

    async def logprobs(
        self, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]], account: Account
    ) -> list[list[float]]:
        """Summed natural log-probability of each of `choices` after each of `prompts`, all token ids: [prompt][choice].

        `_CHOICES_AT_ONCE` are scored at a time. Closes `account` unless it raises. Raises `RequestProblem`, with status 500 where
        the model's numbers are not finite.
        """
        longest = max(map(len, prompts)) + max(map(len, choices))
        if longest >= self._engine.context:
            message = f"prompt and choice have {longest} tokens; the context of {self._engine.context} leaves no room."
            raise RequestProblem(message, param="fields", code="context_length_exceeded")
        for ids in (*prompts, *choices):
            self.phrasing.check_known(ids, param="fields")
        requests = [
            Request((*prompt, *ids), max_tokens=1, logprobs=0, score_from=len(prompt), stop_ids=frozenset())
            for prompt in prompts
            for ids in choices
        ]
        usage = Usage(sum(map(len, prompts)) + len(prompts) * sum(map(len, choices)), 0)
        await account.reserve(usage.prompt)
        found = [0.0] * len(requests)
        at_once = min(_CHOICES_AT_ONCE, self._engine.capacity)
        opening = self._accept(requests[:at_once])
        left = iter(range(len(opening), len(requests)))

        async def score(place: int, stream: TokenStream) -> None:
            while True:
                reply = Reply(place, stream, self._layout, requests[place], [], account.deadline, only_prompt=True)
                async with aclosing(reply.pieces()) as pieces:
                    async for piece in pieces:
                        found[place] += sum(placed.score.logprob or 0.0 for placed in piece.scores)
                # The request that ended has freed its slot. Nothing is awaited before the next one takes it.
                following = next(left, None)
                if following is None:
                    return
                place = following
                (stream,) = self._accept([requests[place]])

        try:
            async with asyncio.TaskGroup() as group:
                for place, stream in enumerate(opening):
                    group.create_task(score(place, stream))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            for stream in opening:
                stream.close()
        if not all(map(math.isfinite, found)):
            message = "the model's log-probabilities are not finite, so no choice is larger than another."
            raise RequestProblem(message, status=500, kind="server_error", code="not_finite")
        account.close(usage, None, 200)
        return [found[first : first + len(choices)] for first in range(0, len(found), len(choices))]

    async def _formed(self, asked: Asked, requests: list[Request]) -> list[Request]:
        if not self._forms.are_wanted(asked):
            return requests
        grammar = await asyncio.to_thread(self._forms.wanted, asked)
        return [replace(request, constraint=await asyncio.to_thread(self._forms.form, grammar)) for request in requests]

    def _accept(self, requests: list[Request]) -> list[TokenStream]:
        if len(requests) > self._engine.capacity:
            most = self._engine.capacity
            raise RequestProblem(
                f"the request asks for {len(requests)} replies, and at most {most} run and wait here; ask for fewer."
            )
        if self._adapter is not None:
            requests = [replace(request, adapter=self._adapter) for request in requests]
        return list(self._engine.generate(requests))

    def _begin(self, asked: Asked, requests: list[Request], deadline: float) -> list[Reply]:
        echoes = isinstance(asked, CompletionRequest) and asked.echo
        texts = asked.prompts if isinstance(asked, CompletionRequest) and echoes else []
        replies = []
        for place, (stream, request) in enumerate(zip(self._accept(requests), requests, strict=True)):
            reply = Reply(place, stream, self._layout, request, asked.stops, deadline)
            if echoes:
                text = texts[place // asked.n]
                reply.echo = text if isinstance(text, str) else self._layout.tokenizer.decode(text, skip_special=False)
                reply.unsaid = len(self._layout.tokenizer.start_ids) if isinstance(text, str) and self._layout.name != "chat" else 0
                reply.only_prompt = asked.max_tokens == 0
            reply.keeps_end = not isinstance(asked, ChatRequest)
            replies.append(reply)
        return replies

    async def _events(
        self,
        asked: Asked,
        replies: list[Reply],
        opening: tuple[Reply, Piece],
        pieces: AsyncGenerator[tuple[Reply, Piece], None],
        prompts: int,
        ending: _Ending,
    ) -> AsyncGenerator[str, None]:
        bodies = Replies(self._model_name, chat=isinstance(asked, ChatRequest))
        with_usage = asked.streams_usage
        empty = {"usage": None} if with_usage else {}
        begun: set[int] = set()
        waiting: dict[int, Piece] = {}

        def chunks(reply: Reply, piece: Piece) -> list[str]:
            index, first = reply.index, reply.index not in begun
            if before := waiting.pop(index, None):  # scores and ids are sent with the text that they end up in
                piece = Piece(piece.text, before.scores + piece.scores, before.ids + piece.ids, piece.finish)
            if not (piece.text or first or piece.finish):
                waiting[index] = piece
                return []
            begun.add(index)
            shown = self._scores(asked, piece.scores) if piece.scores else None
            ids = Ids(reply.request.prompt if first else None, piece.ids) if asked.return_token_ids else None
            made = []
            if piece.text or first or shown or (ids and piece.ids):
                made.append(bodies.chunk(index, piece.text, None, shown, first=first, ids=ids))
            if piece.finish:
                made.append(bodies.chunk(index, "", piece.finish))
            return [event(chunk | empty) for chunk in made]

        status = 200
        try:
            for chunk in chunks(*opening):
                yield chunk
            async for reply, piece in pieces:
                if made := chunks(reply, piece):
                    yield "".join(made)
            if with_usage:
                yield event(bodies.usage_chunk(usage_of(replies, prompts)))
        except Exception as error:
            status = status_of(error)
            yield event(told(error).body)
        ending.status = status
        yield LAST_EVENT

    def _scores(self, asked: Asked, scores: list[Placed]) -> Mapping[str, Any] | None:
        if asked.top is None:
            return None
        tokenizer = self._layout.tokenizer
        found = [placed.score for placed in scores]
        if isinstance(asked, ChatRequest):
            return of_chat(found, tokenizer)
        return of_completion(found, tokenizer, [placed.at for placed in scores])


@dataclass
class _Ending:
    """Status that is counted for a stream: 499 until everything has been sent to the client."""

    status: int = LEFT


class _EventStream(StreamingResponse):
    """Server-sent events that free the engine's slots whatever happens to the client, even before the first event is sent."""

    def __init__(self, events: AsyncGenerator[str, None], ended: Callable[[], Awaitable[None]]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._ended = events, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._ended()
