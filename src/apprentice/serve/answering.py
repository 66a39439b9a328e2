"""Answers: a request, phrased, goes through the engine and comes back whole or as server-sent events in OpenAI's shape.

Knows nothing of routes, keys or replicas.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from apprentice.serve.catalogue import Model
from apprentice.serve.constraint import Forms
from apprentice.serve.engine import EngineFailed, Request
from apprentice.serve.phrasing import Phrasing
from apprentice.serve.protocol import (
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
from apprentice.serve.replying import Piece, Placed, Reply, side_by_side, usage_of
from apprentice.serve.scores import of_chat, of_completion

log = logging.getLogger(__name__)

# Told once how a request that the engine took has ended: tokens, the time of the first (`time.perf_counter`), the status.
OnEnd = Callable[[Usage, float | None, int], None]


class Answering:
    """Answers requests as `model`, for at most `timeout_s` seconds each."""

    def __init__(self, model: Model, *, timeout_s: float) -> None:
        self.phrasing = Phrasing(model.layout, model.engine.context, model.engine.vocabulary)
        self._engine = model.engine
        self._adapter = model.adapter
        self._layout = model.layout
        self._model_name = model.name
        self._timeout_s = timeout_s
        self._forms = Forms(model.layout)

    def requests(self, asked: Asked) -> list[Request]:
        """What the engine is to do. Raises `RequestProblem`."""
        if isinstance(asked, ChatRequest):
            return self.phrasing.chat(asked)
        if isinstance(asked, InstructRequest):
            return self.phrasing.instruct(asked)
        assert isinstance(asked, CompletionRequest)
        return self.phrasing.completion(asked)

    async def answer(self, asked: Asked, requests: list[Request], on_end: OnEnd | None) -> Response:
        """The whole answer or its stream, of the `requests` that `asked` has become.

        Raises `RequestProblem`, `Overloaded` or `EngineFailed` while the status can say it.
        """
        requests = await self._formed(asked, requests)
        replies = self._begin(asked, requests)
        prompts = len(requests) // asked.n
        pieces = side_by_side(replies)
        first: float | None = None

        async def ended(status: int) -> None:
            await pieces.aclose()
            for reply in replies:
                reply.stream.close()
            if on_end is not None:
                on_end(usage_of(replies, prompts), first, status)

        try:
            if asked.stream:
                opening = await anext(pieces)
                first = time.perf_counter()
                return _EventStream(self._events(asked, replies, opening, pieces, prompts), lambda: ended(200))
            gathered = [Piece("", [], []) for _ in replies]
            async with aclosing(pieces):
                async for reply, piece in pieces:
                    first = first or time.perf_counter()
                    gathered[reply.index].text += piece.text
                    gathered[reply.index].scores += piece.scores
        except BaseException as error:
            await ended(503 if isinstance(error, EngineFailed) else 499)
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

    async def logprobs(self, prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> list[float]:
        """Natural log-probability of each of `choices` after `prompt`."""
        longest = len(prompt) + max(len(ids) for ids in choices)
        if longest >= self._engine.context:
            message = f"prompt and choice have {longest} tokens; the context of {self._engine.context} leaves no room."
            raise RequestProblem(message, param="fields", code="context_length_exceeded")
        for ids in (prompt, *choices):
            self.phrasing.check_known(ids, param="fields")
        requests = [
            Request((*prompt, *ids), max_tokens=1, logprobs=0, score_from=len(prompt), stop_ids=frozenset()) for ids in choices
        ]
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        streams = self._accept(requests)
        replies = [
            Reply(place, stream, self._layout, request, [], deadline, only_prompt=True)
            for place, (stream, request) in enumerate(zip(streams, requests, strict=True))
        ]
        found = [0.0] * len(replies)
        async with aclosing(side_by_side(replies)) as pieces:
            async for reply, piece in pieces:
                found[reply.index] += sum(placed.score.logprob or 0.0 for placed in piece.scores)
        return found

    async def _formed(self, asked: Asked, requests: list[Request]) -> list[Request]:
        if not self._forms.are_wanted(asked):
            return requests
        grammar = await asyncio.to_thread(self._forms.wanted, asked)
        return [replace(request, constraint=await asyncio.to_thread(self._forms.form, grammar)) for request in requests]

    def _accept(self, requests: list[Request]) -> list[Any]:
        if len(requests) > self._engine.capacity:
            most = self._engine.capacity
            raise RequestProblem(
                f"the request asks for {len(requests)} replies, and at most {most} run and wait here; ask for fewer."
            )
        if self._adapter is not None:
            requests = [replace(request, adapter=self._adapter) for request in requests]
        return list(self._engine.generate(requests))

    def _begin(self, asked: Asked, requests: list[Request]) -> list[Reply]:
        deadline = asyncio.get_running_loop().time() + self._timeout_s
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
    ) -> AsyncGenerator[str, None]:
        bodies = Replies(self._model_name, chat=isinstance(asked, ChatRequest))
        with_usage = asked.streams_usage
        empty = {"usage": None} if with_usage else {}
        begun: set[int] = set()
        waiting: dict[int, Piece] = {}

        def chunks(reply: Reply, piece: Piece) -> list[str]:
            index, first = reply.index, reply.index not in begun
            if before := waiting.pop(index, None):  # scores and ids come with the text that they end up in
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

        try:
            for chunk in chunks(*opening):
                yield chunk
            async for reply, piece in pieces:
                if made := chunks(reply, piece):
                    yield "".join(made)
            if with_usage:
                yield event(bodies.usage_chunk(usage_of(replies, prompts)))
        except EngineFailed as failure:
            yield event(failed(failure).body)
        except RequestProblem as problem:
            yield event(problem.body)
        except Exception as error:
            yield event(fault(error).body)
        yield LAST_EVENT

    def _scores(self, asked: Asked, scores: list[Placed]) -> Mapping[str, Any] | None:
        if asked.top is None:
            return None
        tokenizer = self._layout.tokenizer
        found = [placed.score for placed in scores]
        if isinstance(asked, ChatRequest):
            return of_chat(found, tokenizer)
        return of_completion(found, tokenizer, [placed.at for placed in scores])


class _EventStream(StreamingResponse):
    """Server-sent events that free the engine whatever happens to the client, even before the first event is out."""

    def __init__(self, events: AsyncGenerator[str, None], ended: Callable[[], Awaitable[None]]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._ended = events, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._ended()


def fault(error: Exception) -> RequestProblem:
    """What a client reads where something went wrong that is no answer of ours; the log has it whole."""
    log.error("a request failed by a fault of ours", exc_info=error)
    message = f"{type(error).__name__}: this is a fault of the endpoint; its log says more."
    return RequestProblem(message, status=500, kind="server_error")


def failed(failure: EngineFailed) -> RequestProblem:
    """What a client reads when the engine has stopped."""
    return RequestProblem(f"the engine has stopped: {failure}.", status=503, kind="server_error", code="engine_failed")
