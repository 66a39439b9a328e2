"""An engine of the tests' own making: it says what it was told to say."""

from __future__ import annotations

from pathlib import Path

from apprentice.inference.generation_request import GeneratedToken, GenerationRequest, ScoredToken
from apprentice.serve.engines.base import EngineFailed, EngineStats, Overloaded, TokenStream


class ScriptedReply:
    """One reply of a `ScriptedEngine`; two tokens come at a time."""

    def __init__(self, engine: ScriptedEngine, prompt: tuple[ScoredToken, ...]) -> None:
        self.engine = engine
        self.prompt = prompt
        self.place = 0
        self.is_open = True

    def __aiter__(self) -> ScriptedReply:
        return self

    async def __anext__(self) -> list[GeneratedToken]:
        ids = self.engine.ids[self.place : self.place + 2]
        self.place += len(ids)
        if not ids:
            raise self.engine.failure
        ends = self.place == len(self.engine.ids) and not self.engine.fails
        scores = [ScoredToken(id, -0.5 - id, ((id, -0.5 - id), (9, -9.0))) for id in ids]
        tokens = [GeneratedToken("", id, None, score) for id, score in zip(ids, scores, strict=True)]
        if self.place == len(ids):
            tokens[0] = tokens[0]._replace(prompt_scores=self.prompt, reused=self.engine.cached)
        return [*tokens[:-1], GeneratedToken("", ids[-1], "stop" if ends else None, scores[-1])]

    def close(self) -> None:
        self.engine.open -= self.is_open
        self.is_open = False


class ScriptedEngine:
    """Replies with the ids it was given; then it ends, or fails, or (with nothing to say) is overloaded.

    `cached` tokens of each prompt were in memory.
    """

    def __init__(
        self,
        ids: list[int],
        *,
        fails: bool = False,
        failure: Exception | None = None,
        prompt_scores: bool = False,
        cached: int = 0,
    ) -> None:
        self.ids = ids
        self.prompt_scores = prompt_scores
        self.cached = cached
        self.fails = fails
        self.failure = failure or EngineFailed("out of memory")
        self.requests: list[GenerationRequest] = []
        self.open = self.most = 0
        self.closed = False

    follows_any_constraint = True

    context = 100

    capacity = 8

    vocabulary = 1_000_000

    def load_adapter(self, folder: Path) -> str:
        return folder.name

    def generate(self, requests: list[GenerationRequest]) -> list[TokenStream]:
        if not self.ids:
            raise Overloaded
        self.requests += requests
        if self.open + len(requests) > self.capacity:
            raise Overloaded
        self.open += len(requests)
        self.most = max(self.most, self.open)
        return [ScriptedReply(self, self.scores(request) if self.prompt_scores else ()) for request in requests]

    def scores(self, request: GenerationRequest) -> tuple[ScoredToken, ...]:
        return tuple(ScoredToken(id, -1.0 if place else None) for place, id in enumerate(request.prompt))

    def stats(self) -> EngineStats:
        return EngineStats(self.open, 0, len(self.requests), 0)

    def check(self) -> None:
        if self.fails:
            raise EngineFailed("out of memory")

    def close(self) -> None:
        self.closed = True
