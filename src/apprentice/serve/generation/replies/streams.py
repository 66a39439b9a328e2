"""Replies of one request from an engine's token streams: text as it becomes certain, scores, and several replies interleaved."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

from apprentice.inference.generation_request import GeneratedToken, GenerationRequest, ScoredToken
from apprentice.pretrained.replies.reply_parser import ReplyDelta, ReplyParser
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.serve.api.schemas.problems import RequestProblem
from apprentice.serve.engines.base import EngineFailed, RequestFailed, TokenStream
from apprentice.serve.generation.detokenize import IncrementalDetokenizer
from apprentice.serve.generation.replies.reply_parts import PartReader, has_calls


@dataclass
class ReplyChunk:
    """The next part of one reply; `finish` is set on the last one.

    `offsets` are where the text of each token in `scores` begins in the choice's text, in characters.
    """

    text: str = ""
    scores: list[ScoredToken] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    finish: str | None = None
    parts: list[ReplyDelta] | None = None  # of `text`, where the reply is read

    def append(self, other: ReplyChunk) -> None:
        """Adds the chunk that follows this one."""
        self.text += other.text
        self.scores += other.scores
        self.offsets += other.offsets
        self.ids += other.ids
        self.finish = other.finish
        if other.parts is not None:
            self.parts = [*(self.parts or ()), *other.parts]


@dataclass
class ReplyStream:
    """One reply on its way from the engine to text; `finish`, `ids` and `cached` are complete once `chunks()` has ended.

    `echo` is the text that the reply begins with; it leaves out `unechoed_tokens` at the prompt's start. `is_only_scored` leaves
    out the token that the engine adds to a prompt that is only to be scored.
    """

    index: int
    tokens: TokenStream
    tokenizer: Tokenizer
    request: GenerationRequest
    deadline: float  # seconds on the event loop's clock
    stops: Sequence[str] = ()
    echo: str = ""
    unechoed_tokens: int = 0
    is_only_scored: bool = False
    scores_end_token: bool = True
    reader: PartReader | None = None  # reads the parts of a chat's reply
    finish: str = "length"
    ids: list[int] = field(default_factory=list)  # all that were produced, the end token included
    cached: int = 0  # tokens of the prompt that were in the KV cache
    thought_tokens: int = 0  # of `ids`, once the reply has ended
    _has_calls: bool = False

    async def chunks(self) -> AsyncGenerator[ReplyChunk, None]:
        """The reply in chunks as its text becomes certain; a chunk's text is often empty.

        Closing the generator frees the engine's slot. Raises `RequestProblem` after the deadline or where this request cannot be
        decoded, `EngineFailed` where the engine stops.
        """
        detokenizer = IncrementalDetokenizer(self.reader.decode() if self.reader else self.tokenizer.decode, self.stops)
        parser = self.reader.parser() if self.reader else None
        is_first = True
        try:
            while True:
                tokens = await self._next_tokens()
                chunk = await self._first_chunk(tokens[0]) if is_first else ReplyChunk()
                is_first = False
                has_ended = self.is_only_scored or self._add(tokens, detokenizer, chunk)
                if has_ended:
                    chunk.text += "" if self.is_only_scored else detokenizer.end()
                    chunk.finish = self.finish
                    self.thought_tokens = 0 if self.reader is None else self.reader.thought_tokens(self.ids)
                if parser is not None:
                    self._read(chunk, parser)
                yield chunk
                if has_ended:
                    return
        finally:
            self.tokens.close()

    def _read(self, chunk: ReplyChunk, parser: ReplyParser) -> None:
        """Reads the parts of the chunk's text; a reply that ends with calls is finished by them, unless the last was cut."""
        chunk.parts = [*parser.feed(chunk.text), *(parser.finish() if chunk.finish else ())]
        self._has_calls = self._has_calls or has_calls(chunk.parts)
        if chunk.finish == "stop" and self._has_calls and not parser.is_in_arguments:
            self.finish = chunk.finish = "tool_calls"

    async def _first_chunk(self, token: GeneratedToken) -> ReplyChunk:
        """The echo with the prompt's scores, which come with the first token."""
        self.cached = token.reused
        offsets = [0] * len(token.prompt_scores)
        if token.prompt_scores and self.echo:
            ids = [score.id for score in token.prompt_scores]
            offsets = await asyncio.to_thread(_text_offsets, self.tokenizer, ids, self.unechoed_tokens)
        return ReplyChunk(self.echo, list(token.prompt_scores), offsets)

    async def _next_tokens(self) -> list[GeneratedToken]:
        try:
            async with asyncio.timeout_at(self.deadline):
                return await anext(self.tokens)
        except TimeoutError as error:
            message = "the reply was not finished in the time that this endpoint gives a request; ask for fewer tokens."
            raise RequestProblem(message, status=504, kind="server_error", code="request_timeout") from error
        except RequestFailed as error:
            raise RequestProblem(f"the request cannot be decoded: {error}", code="request_failed") from error

    def _add(self, tokens: list[GeneratedToken], detokenizer: IncrementalDetokenizer, chunk: ReplyChunk) -> bool:
        """Adds tokens to the chunk; true once the reply has ended."""
        for token in tokens:
            self.ids.append(token.id)
            chunk.ids.append(token.id)
            is_end_token = token.finish == "stop"
            if token.score is not None and (self.scores_end_token or not is_end_token):
                chunk.scores.append(token.score)
                chunk.offsets.append(len(self.echo) + detokenizer.length)
            if not is_end_token:
                chunk.text += detokenizer.add(token.id)
            if detokenizer.stopped or token.finish:
                self.finish = "stop" if detokenizer.stopped else str(token.finish)
                return True
        return False


def _text_offsets(tokenizer: Tokenizer, ids: Sequence[int], unechoed_tokens: int) -> list[int]:
    """Where each token's text begins in the text of `ids`, with special tokens and without the first `unechoed_tokens`."""
    detokenizer = IncrementalDetokenizer(partial(tokenizer.decode, skip_special=False))
    offsets = [0] * unechoed_tokens
    for id in ids[unechoed_tokens:]:
        offsets.append(detokenizer.length)
        detokenizer.add(id)
    return offsets


async def merge_replies(replies: Sequence[ReplyStream]) -> AsyncGenerator[tuple[ReplyStream, ReplyChunk], None]:
    """Chunks of all replies in the order of arrival. Closing the generator closes them all. Raises the first error of any."""
    if len(replies) == 1:
        async with aclosing(replies[0].chunks()) as chunks:
            async for chunk in chunks:
                yield replies[0], chunk
        return
    arrived: asyncio.Queue[tuple[ReplyStream, ReplyChunk] | None] = asyncio.Queue()  # None: no more will come

    async def read(reply: ReplyStream) -> None:
        async with aclosing(reply.chunks()) as chunks:
            async for chunk in chunks:
                arrived.put_nowait((reply, chunk))

    async def read_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for reply in replies:
                    group.create_task(read(reply))
        finally:
            arrived.put_nowait(None)

    # A task of its own around the group: only the task that enters a group may leave it, and each chunk may be read by another.
    readers = asyncio.create_task(read_all())
    unfinished = len(replies)
    try:
        while (arrival := await arrived.get()) is not None:
            unfinished -= arrival[1].finish is not None
            yield arrival
        try:
            await readers
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        if unfinished:
            raise EngineFailed("a reply broke off")
    finally:
        readers.cancel()
        await asyncio.gather(readers, return_exceptions=True)
        for reply in replies:
            reply.tokens.close()  # a reader that was cancelled before it began has not closed its stream
