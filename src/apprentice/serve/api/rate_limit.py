"""What the keys have used, counted in the one replica there is, or in one process for all of them.

The counting itself is `keys.Limiter`'s. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from apprentice.serve.api.keys import Left, Limiter
from apprentice.serve.api.schemas import RequestProblem
from apprentice.serve.loopback import listen_on_loopback

log = logging.getLogger(__name__)
_ANSWER_S = 5.0  # for so long a request waits for the limiter


class LimiterOfAll:
    """The limits of the keys, in one process for all replicas."""

    def __init__(self) -> None:
        listen_on_loopback()
        self._limiter = Limiter()

    async def admit(self, name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> Left:
        return self._limiter.admit(name, requests_per_minute, tokens_per_minute)

    async def reserve(self, name: str, tokens_per_minute: int, tokens: int) -> Left:
        return self._limiter.reserve(name, tokens_per_minute, tokens)

    async def settle(self, name: str, tokens_per_minute: int, reserved: int, used: int) -> None:
        self._limiter.settle(name, tokens_per_minute, reserved, used)


class SharedLimits:
    """Asks the limiter of all replicas. While that is down, requests of limited keys are refused."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def admit(self, name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> Left:
        return await self._ask(self._handle.admit, name, requests_per_minute, tokens_per_minute)

    async def reserve(self, name: str, tokens_per_minute: int, tokens: int) -> Left:
        return await self._ask(self._handle.reserve, name, tokens_per_minute, tokens)

    def settle(self, name: str, tokens_per_minute: int, reserved: int, used: int) -> None:
        try:
            self._handle.settle.remote(name, tokens_per_minute, reserved, used)
        except Exception as error:  # the minute makes up for what does not come back
            log.warning("the limiter was not told what a request used: %s", error)

    async def _ask(self, method: Any, *asked: Any) -> Left:
        try:
            async with asyncio.timeout(_ANSWER_S):
                return Left(*await method.remote(*asked))
        except Exception as error:  # Ray Serve has many names for a deployment that does not answer
            log.warning("the limiter does not answer: %s: %s", type(error).__name__, error)
            message = "the limits of API keys cannot be looked up now; try again in a moment."
            raise RequestProblem(
                message, status=503, kind="server_error", code="limits_unavailable", retry_after_s=int(_ANSWER_S)
            ) from error


class OwnLimits:
    """The limits where there is one replica only."""

    def __init__(self, limiter: Limiter | None = None) -> None:
        self._limiter = limiter or Limiter()

    async def admit(self, name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> Left:
        return self._limiter.admit(name, requests_per_minute, tokens_per_minute)

    async def reserve(self, name: str, tokens_per_minute: int, tokens: int) -> Left:
        return self._limiter.reserve(name, tokens_per_minute, tokens)

    def settle(self, name: str, tokens_per_minute: int, reserved: int, used: int) -> None:
        self._limiter.settle(name, tokens_per_minute, reserved, used)
