"""Protocol of inference engines: token ids in, token ids out, streamed as they are produced.

    (stream,) = engine.generate([EngineRequest(prompt=(1, 2, 3), max_tokens=16)])
    async for tokens in stream:  # a list of one or more `NewToken`; the last one has a `finish`
        ...
    stream.close()

transformers.py and vllm.py implement it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class EngineRequest:
    """A request for one reply: at most `max_tokens` tokens, ended by one of `stop_ids` (part of the reply) or by a full context.

    `logprobs` is how many of the best tokens are scored beside each token of the reply (None: no scores at all). `score_from` is
    the index of the first prompt token to score as well. `constraint` has the methods of `inference.sampler.Constraint`, and a
    `grammar` in llguidance's format. `adapter` is what `Engine.load_adapter` returned.
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


class TokenScore(NamedTuple):
    """A token, its natural log-probability (None for a text's first token), and the best tokens as (id, log-probability)."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class NewToken(NamedTuple):
    """One token of a reply; `finish` says why it is the last, or is None.

    A reply's first token also has the `prompt`'s scores, if requested, and `cached`: how many prompt tokens were taken from another
    request's KV cache.
    """

    id: int
    finish: Finish | None
    score: TokenScore | None = None
    prompt: tuple[TokenScore, ...] = ()
    cached: int = 0


class EngineStats(NamedTuple):
    """Gauges and counters of one engine."""

    running: int  # requests that are being decoded
    queued: int  # requests that wait for a slot
    requests: int  # requests accepted since the start
    tokens: int  # tokens produced since the start
    prompt_tokens: int = 0  # prompt tokens accepted since the start
    shared_tokens: int = 0  # of them, those taken from another request's KV cache
    kv_use: float = 0.0  # share of the KV memory that running requests use
    kv_reserved: float = 0.0  # share of it that they may grow to; admission goes by this
    kv_tokens: int = 0  # size of the KV memory in tokens of all requests together


class Overloaded(Exception):  # noqa: N818 - a normal state under load, answered with status 429
    """The engine's queue is full."""


class EngineFailed(Exception):  # noqa: N818
    """The engine has stopped for good; Ray Serve replaces the replica."""


class RequestFailed(Exception):  # noqa: N818
    """One request cannot be decoded, for the reason in the message; the engine and all other requests go on."""


class TokenStream(Protocol):
    """Tokens of one reply as an async iterator; each step gives a list of all tokens since the last step, at least one.

    Raises `EngineFailed` or `RequestFailed`.
    """

    def __aiter__(self) -> AsyncIterator[list[NewToken]]: ...

    async def __anext__(self) -> list[NewToken]: ...

    def close(self) -> None:
        """Frees the reply's slot, whether or not it is finished; may be called again."""


class Engine(Protocol):
    """An inference engine. All methods but `load_adapter` are called from one event loop."""

    @property
    def context(self) -> int:
        """Most tokens of prompt and reply together."""

    @property
    def capacity(self) -> int:
        """Most requests that run and wait together."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model's weights have, from 0 on; a tokenizer may have more."""

    def load_adapter(self, folder: Path) -> Any:
        """Loads the adapter in `folder`, for `EngineRequest.adapter`. Raises `ModelError` where it does not fit the model.

        Blocks until it is loaded, so it is called from a thread other than the event loop's.
        """

    def generate(self, requests: list[EngineRequest]) -> Sequence[TokenStream]:
        """Accepts all requests, or raises `Overloaded` or `EngineFailed` and accepts none. The caller must close each stream."""

    def stats(self) -> EngineStats:
        """The engine's current gauges and counters."""

    def check(self) -> None:
        """Raises `EngineFailed` if the engine has stopped."""

    def close(self) -> None:
        """Stops the engine; replies in progress fail."""
