"""What the keys have used, counted in the one replica there is, or in one process for all of them.

The counting itself is `keys.Limiter`'s. Knows nothing of HTTP.
"""

from __future__ import annotations

from typing import Any

from apprentice.serve.keys import Limiter


class LimiterOfAll:
    """The limits of the keys, in one process for all replicas."""

    def __init__(self) -> None:
        self._limiter = Limiter()

    async def admit(self, name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> float:
        return self._limiter.admit(name, requests_per_minute, tokens_per_minute)

    async def spend(self, name: str, tokens_per_minute: int, tokens: int) -> None:
        self._limiter.spend(name, tokens_per_minute, tokens)


class SharedLimits:
    """Asks the limiter of all replicas."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def admit(self, name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> float:
        return float(await self._handle.admit.remote(name, requests_per_minute, tokens_per_minute))

    def spend(self, name: str, tokens_per_minute: int, tokens: int) -> None:
        self._handle.spend.remote(name, tokens_per_minute, tokens)


class OwnLimits:
    """The limits where there is one replica only."""

    def __init__(self) -> None:
        self._limiter = Limiter()

    async def admit(self, name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> float:
        return self._limiter.admit(name, requests_per_minute, tokens_per_minute)

    def spend(self, name: str, tokens_per_minute: int, tokens: int) -> None:
        self._limiter.spend(name, tokens_per_minute, tokens)
