"""Streamed replies: chunks of a reply group as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from apprentice.serve.api.error_status import CLIENT_CLOSED, problem_of, status_of
from apprentice.serve.api.schemas.requests import GenerationFields
from apprentice.serve.api.schemas.responses import LAST_EVENT, ChatCompletionChunk, Completion
from apprentice.serve.generation.replies.reply_formats import ChatFormat, ChoiceTokens, ReplyFormat
from apprentice.serve.generation.replies.reply_group import ReplyGroup
from apprentice.serve.generation.replies.streams import ReplyChunk, ReplyStream


def choice_tokens(body: GenerationFields, chunk: ReplyChunk, prompt_ids: Sequence[int] | None) -> ChoiceTokens:
    """The tokens of a chunk, as far as the request asks for them."""
    scores = chunk.scores if body.scored_tokens is not None else None
    ids, prompt_ids = (chunk.ids, prompt_ids) if body.return_token_ids else (None, None)
    return ChoiceTokens(scores, chunk.offsets, ids, prompt_ids)


class ReplyEvents:
    """The events of one stream. `opening` is the group's first chunk, which was awaited before the response began.

    `status` is the HTTP status that is counted: 499 until everything has been sent to the client.
    """

    def __init__(
        self, body: GenerationFields, bodies: ReplyFormat, group: ReplyGroup, opening: tuple[ReplyStream, ReplyChunk]
    ) -> None:
        self.status = CLIENT_CLOSED
        self._body, self._bodies, self._group, self._opening = body, bodies, group, opening
        self._begun: set[int] = set()  # indices of choices of which something was sent
        self._unsent: dict[int, ReplyChunk] = {}  # scores and ids are sent with the text that they end up in

    async def generate(self) -> AsyncGenerator[str, None]:
        """The events; an error becomes an event, and `[DONE]` is always the last."""
        status = 200
        try:
            for text in self._events(*self._opening):
                yield text
            async for reply, chunk in self._group:
                if texts := self._events(reply, chunk):
                    yield "".join(texts)
            if self._body.streams_usage:
                yield self._bodies.usage_chunk(self._group.usage).to_event()
        except Exception as error:
            status = status_of(error)
            yield problem_of(error).body.to_event()
        self.status = status
        yield LAST_EVENT

    def _events(self, reply: ReplyStream, chunk: ReplyChunk) -> list[str]:
        index, is_first = reply.index, reply.index not in self._begun
        if (earlier := self._unsent.pop(index, None)) is not None:
            earlier.append(chunk)
            chunk = earlier
        is_empty = not chunk.text if chunk.parts is None else not chunk.parts
        if is_empty and not is_first and not chunk.finish:
            self._unsent[index] = chunk
            return []
        self._begun.add(index)
        if chunk.parts is not None:
            return self._part_events(reply, chunk, is_first=is_first)
        tokens = choice_tokens(self._body, chunk, reply.request.prompt if is_first else None)
        tokens = tokens._replace(scores=tokens.scores or None)
        bodies = []
        if chunk.text or is_first or tokens.scores or tokens.ids:
            bodies.append(self._bodies.chunk(index, chunk.text, None, tokens, is_first=is_first))
        if chunk.finish:
            bodies.append(self._bodies.chunk(index, "", chunk.finish, ChoiceTokens()))
        return self._sent(bodies)

    def _part_events(self, reply: ReplyStream, chunk: ReplyChunk, *, is_first: bool) -> list[str]:
        """Events of a chunk that is read: the role, each part, and the end; the first of them has the tokens."""
        assert isinstance(self._bodies, ChatFormat)
        index, parts = reply.index, list(chunk.parts or ())
        tokens = choice_tokens(self._body, chunk, reply.request.prompt if is_first else None)
        tokens = tokens._replace(scores=tokens.scores or None)
        bodies: list[ChatCompletionChunk] = []
        if is_first or (not parts and (tokens.scores or tokens.ids)):
            bodies.append(self._bodies.chunk(index, "", None, tokens, is_first=is_first))
            tokens = ChoiceTokens()
        for part in parts:
            bodies.append(self._bodies.part_chunk(index, part, tokens))
            tokens = ChoiceTokens()
        if chunk.finish:
            bodies.append(self._bodies.chunk(index, "", chunk.finish, ChoiceTokens()))
        return self._sent(bodies)

    def _sent(self, bodies: Sequence[Completion | ChatCompletionChunk]) -> list[str]:
        if self._body.streams_usage:
            for body in bodies:
                body.usage = None  # as `null`: it comes with the last chunk
        return [body.to_event() for body in bodies]


class EventStream(StreamingResponse):
    """Server-sent events that free the engine's slots whatever happens to the client, even before the first event is sent."""

    def __init__(self, events: AsyncGenerator[str, None], on_end: Callable[[], Awaitable[None]]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._on_end()
