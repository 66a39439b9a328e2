"""What an engine is to the rest of serving: token ids in, token ids out, one at a time.

Knows nothing of text, HTTP, Ray or PyTorch; the engines in `*_engine.py` fulfil it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One reply that is wanted: at most `max_tokens` tokens, ended by one of `stop_ids` (reported too) or by a full context."""

    prompt: tuple[int, ...]
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class NewToken(NamedTuple):
    """One token of a reply; `finish` says why it is the last, or is None."""

    id: int
    finish: Finish | None


class Stats(NamedTuple):
    """Gauges and counters of one engine."""

    running: int  # requests that are being decoded
    queued: int  # requests that wait for a place
    requests: int  # requests accepted since the start
    tokens: int  # tokens produced since the start


class Overloaded(Exception):  # noqa: N818 - a state of the engine, and every client's everyday answer
    """The engine has as many requests waiting as it takes."""


class EngineFailed(Exception):  # noqa: N818
    """The engine has stopped for good; the replica is replaced."""


class Engine(Protocol):
    """All methods are called from one event loop."""

    @property
    def context(self) -> int:
        """Tokens of prompt and reply together."""

    def generate(self, request: Request) -> AsyncGenerator[NewToken, None]:
        """The reply, token by token; whoever closes the generator early frees its place.

        Raises `Overloaded` before the first token, and `EngineFailed` whenever the engine stops.
        """

    def stats(self) -> Stats:
        """Where the engine stands now."""

    def check(self) -> None:
        """Raises `EngineFailed` if the engine has stopped."""

    def close(self) -> None:
        """Stops the engine; replies under way fail."""
