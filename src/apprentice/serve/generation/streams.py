"""Replies of one request from an engine's token streams: text as it becomes certain, scores, and several replies interleaved."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from apprentice.data.encoding.prompt_format import Layout
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.serve.api.schemas import RequestProblem, Usage
from apprentice.serve.engines.base import EngineFailed, NewToken, Request, RequestFailed, Score, TokenStream
from apprentice.serve.generation.detokenize import TextStream


class Placed(NamedTuple):
    """A token's score, and where the token's text begins in the choice's text, in characters."""

    score: Score
    at: int


@dataclass
class Piece:
    """The next part of one reply; `finish` is set on the last one."""

    text: str
    scores: list[Placed]
    ids: list[int]
    finish: str | None = None


@dataclass
class Reply:
    """One reply on its way from the engine to text; `finish` and `ids` are complete once `pieces()` has ended.

    `only_prompt` leaves out the token that the engine adds to a prompt that is only to be scored.
    """

    index: int
    stream: TokenStream
    layout: Layout
    request: Request
    stops: list[str]
    deadline: float  # seconds on the event loop's clock
    echo: str = ""
    unsaid: int = 0  # tokens at the prompt's start that `echo` does not show
    only_prompt: bool = False
    keeps_end: bool = True  # whether the end token is among the scores
    finish: str = "length"
    ids: list[int] = field(default_factory=list)  # all that were produced, the end token included
    cached: int = 0  # tokens of the prompt that were in the KV cache

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The reply in pieces as its text becomes certain; a piece's text is often empty.

        Closing the generator frees the engine's slot. Raises `RequestProblem` after the deadline or where this request cannot be
        decoded, `EngineFailed` where the engine stops.
        """
        text = TextStream(self.layout.tokenizer.decode, self.stops)
        opening: str | None = self.echo
        try:
            while True:
                tokens = await self._next()
                if opening is not None:
                    self.cached = tokens[0].cached
                piece = Piece(opening or "", await self._placed(tokens[0].prompt), [])
                ended = self.only_prompt or self._take(tokens, text, piece)
                opening = None
                if ended:
                    piece.text += "" if self.only_prompt else text.end()
                    piece.finish = self.finish
                    yield piece
                    return
                yield piece
        finally:
            self.stream.close()

    async def _placed(self, prompt: Sequence[Score]) -> list[Placed]:
        """The prompt's scores with their places in the echoed text."""
        if not prompt or not self.echo:
            return [Placed(score, 0) for score in prompt]
        ids = [score.id for score in prompt]
        places = await asyncio.to_thread(_places, self.layout.tokenizer, ids, self.unsaid)
        return [Placed(score, at) for score, at in zip(prompt, places, strict=True)]

    async def _next(self) -> list[NewToken]:
        try:
            async with asyncio.timeout_at(self.deadline):
                return await anext(self.stream)
        except TimeoutError as error:
            message = "the reply was not finished in the time that this endpoint gives a request; ask for fewer tokens."
            raise RequestProblem(message, status=504, kind="server_error", code="request_timeout") from error
        except RequestFailed as error:
            raise RequestProblem(f"the request cannot be decoded: {error}", code="request_failed") from error

    def _take(self, tokens: list[NewToken], text: TextStream, piece: Piece) -> bool:
        for token in tokens:
            self.ids.append(token.id)
            piece.ids.append(token.id)
            if token.score is not None and (self.keeps_end or token.finish != "stop"):
                piece.scores.append(Placed(token.score, len(self.echo) + text.length))
            if token.finish != "stop":
                piece.text += text.add(token.id)
            if text.stopped or token.finish:
                self.finish = "stop" if text.stopped else str(token.finish)
                return True
        return False


def _places(tokenizer: Tokenizer, ids: Sequence[int], unsaid: int) -> list[int]:
    """Where each token's text begins in the text of all `ids`, with special tokens shown and the first `unsaid` left out."""
    text = TextStream(partial(tokenizer.decode, skip_special=False))
    places = [0] * unsaid
    for id in ids[unsaid:]:
        places.append(text.length)
        text.add(id)
    return places


def usage_of(replies: Sequence[Reply], prompts: int) -> Usage:
    """Tokens of a request: those of its `prompts` different prompts, each counted once, and those of all replies."""
    each = len(replies) // prompts
    asked = replies[::each]
    read, cached = sum(len(reply.request.prompt) for reply in asked), sum(reply.cached for reply in asked)
    return Usage(read, sum(len(reply.ids) for reply in replies), cached)


async def side_by_side(replies: Sequence[Reply]) -> AsyncGenerator[tuple[Reply, Piece], None]:
    """Pieces of all replies in the order of arrival. Closing the generator closes them all. Raises the first error of any."""
    if len(replies) == 1:
        async with aclosing(replies[0].pieces()) as pieces:
            async for piece in pieces:
                yield replies[0], piece
        return
    arrived: asyncio.Queue[tuple[Reply, Piece] | None] = asyncio.Queue()  # None: no more will come

    async def read(reply: Reply) -> None:
        async with aclosing(reply.pieces()) as pieces:
            async for piece in pieces:
                arrived.put_nowait((reply, piece))

    async def read_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for reply in replies:
                    group.create_task(read(reply))
        finally:
            arrived.put_nowait(None)

    # A task of its own around the group: only the task that enters a group may leave it, and each piece may be read by another.
    readers = asyncio.create_task(read_all())
    unfinished = len(replies)
    try:
        while (news := await arrived.get()) is not None:
            unfinished -= news[1].finish is not None
            yield news
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
            reply.stream.close()  # a reader that was cancelled before it began has not closed its stream
