"""Protocol of inference engines: token ids in, token ids out, streamed as they are produced.

    (stream,) = engine.generate([GenerationRequest(prompt=(1, 2, 3), max_new_tokens=16)])
    async for tokens in stream:  # a list of one or more `GeneratedToken`; the last one has a `finish`
        ...
    stream.close()

transformers.py and vllm.py implement it. Requests and tokens are those of `inference.generation_request`, in all of `serve`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from apprentice.inference.generation_request import GeneratedToken, GenerationRequest


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

    def __aiter__(self) -> AsyncIterator[list[GeneratedToken]]: ...

    async def __anext__(self) -> list[GeneratedToken]: ...

    def close(self) -> None:
        """Frees the reply's slot, whether or not it is finished; may be called again."""


class Engine(Protocol):
    """An inference engine. All methods but `load_adapter` are called from one event loop.

    `follows_any_constraint` is true if a request's constraint may be of any kind, and not only a `GrammarConstraint`.
    """

    follows_any_constraint: bool

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
        """Loads the adapter in `folder`, for `GenerationRequest.adapter`. Raises `ModelError` where it does not fit the model.

        Blocks until it is loaded, so it is called from a thread other than the event loop's.
        """

    def generate(self, requests: list[GenerationRequest]) -> Sequence[TokenStream]:
        """Accepts all requests, or raises `Overloaded` or `EngineFailed` and accepts none. The caller must close each stream."""

    def stats(self) -> EngineStats:
        """The engine's current gauges and counters."""

    def check(self) -> None:
        """Raises `EngineFailed` if the engine has stopped."""

    def close(self) -> None:
        """Stops the engine; replies in progress fail."""
