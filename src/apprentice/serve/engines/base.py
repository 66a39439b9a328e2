"""What an engine is to the rest of serving: token ids in, token ids out, as they come.

Knows nothing of text, HTTP, Ray or PyTorch; the engines in `*_engine.py` fulfil it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One reply that is wanted: at most `max_tokens` tokens, ended by one of `stop_ids` (reported too) or by a full context.

    `logprobs` None: none; else so many of the best tokens besides each token's own. `score_from` wants them of the prompt too,
    from that place on.
    `constraint` is an object with the methods of `models.sampling.Constraint` and the `grammar` that it follows, in llguidance's
    words; `adapter` is what the engine's `adapter` gave.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    score_from: int | None = None
    constraint: Any = None
    adapter: Any = None


class Score(NamedTuple):
    """A token with its natural log-probability (None for a text's first) and those of the best tokens."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class NewToken(NamedTuple):
    """One token of a reply; `finish` says why it is the last, or is None.

    The first brings the prompt's scores, if wanted, and how many of its tokens are `cached`: taken from another request's memory.
    """

    id: int
    finish: Finish | None
    score: Score | None = None
    prompt: tuple[Score, ...] = ()
    cached: int = 0


class Stats(NamedTuple):
    """Gauges and counters of one engine."""

    running: int  # requests that are being decoded
    queued: int  # requests that wait for a place
    requests: int  # requests accepted since the start
    tokens: int  # tokens produced since the start
    prompt_tokens: int = 0  # prompt tokens accepted since the start
    shared_tokens: int = 0  # of them, those taken from another request's memory
    kv_use: float = 0.0  # share of the memory for keys and values that running requests use
    kv_reserved: float = 0.0  # share of it that they may come to use, by which requests are let in
    kv_tokens: int = 0  # tokens of all requests together that the memory has room for


class Overloaded(Exception):  # noqa: N818 - a state of the engine, and every client's everyday answer
    """The engine has as many requests waiting as it takes."""


class EngineFailed(Exception):  # noqa: N818
    """The engine has stopped for good; the replica is replaced."""


class RequestFailed(Exception):  # noqa: N818
    """This request cannot be decoded, for the reason that the message gives; the engine and all others go on."""


class TokenStream(Protocol):
    """One reply's tokens: each step gives all that have come since the last, one at least.

    Raises `EngineFailed` or `RequestFailed`.
    """

    def __aiter__(self) -> AsyncIterator[list[NewToken]]: ...

    async def __anext__(self) -> list[NewToken]: ...

    def close(self) -> None:
        """Frees the reply's place, whether or not it is finished; may be called again."""


class Engine(Protocol):
    """All methods are called from one event loop."""

    @property
    def context(self) -> int:
        """Tokens of prompt and reply together."""

    @property
    def capacity(self) -> int:
        """Requests that run and wait at most."""

    @property
    def vocabulary(self) -> int:
        """Token ids from 0 on that the model can read and say; a tokenizer may know more of them than the weights do."""

    def adapter(self, folder: Path) -> Any:
        """The adapter in `folder`, to be given in requests. From any thread. Raises `ModelError` where it does not fit."""

    def generate(self, requests: list[Request]) -> Sequence[TokenStream]:
        """Accepts all, or raises `Overloaded` or `EngineFailed`. Whoever holds a stream must close it."""

    def stats(self) -> Stats:
        """Where the engine stands now."""

    def check(self) -> None:
        """Raises `EngineFailed` if the engine has stopped."""

    def close(self) -> None:
        """Stops the engine; replies under way fail."""
