"""Rate limiter that all replicas share: a Ray Serve deployment, and its client in each replica."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from apprentice.serve.api.limits.rate_limiter import LimitStatus, RateLimiter
from apprentice.serve.api.schemas.problems import RequestProblem
from apprentice.serve.compat import listen_on_loopback

log = logging.getLogger(__name__)
_ANSWER_S = 5.0  # seconds that a request waits for the shared limiter


class RateLimiterDeployment:
    """Ray Serve deployment class with the one limiter that all replicas share."""

    def __init__(self) -> None:
        listen_on_loopback()
        self._limiter = RateLimiter()

    async def admit(self, name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> LimitStatus:
        """`RateLimiter.admit`."""
        return self._limiter.admit(name, requests_per_minute, tokens_per_minute)

    async def reserve(self, name: str, tokens_per_minute: int, tokens: int) -> LimitStatus:
        """`RateLimiter.reserve`."""
        return self._limiter.reserve(name, tokens_per_minute, tokens)

    async def settle(self, name: str, tokens_per_minute: int, reserved: int, used: int) -> None:
        """`RateLimiter.settle`."""
        self._limiter.settle(name, tokens_per_minute, reserved, used)


class SharedRateLimits:
    """`RateLimits` by a `RateLimiterDeployment`; `handle` is its Serve handle.

    While it is down, requests of limited keys are refused with status 503.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def admit(self, name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> LimitStatus:
        """Counts a request of the key in the shared limiter, if it is admitted."""
        return await self._call(self._handle.admit, name, requests_per_minute, tokens_per_minute)

    async def reserve(self, name: str, tokens_per_minute: int, tokens: int) -> LimitStatus:
        """Takes the tokens that a request may use in the shared limiter, if they are left."""
        return await self._call(self._handle.reserve, name, tokens_per_minute, tokens)

    def settle(self, name: str, tokens_per_minute: int, reserved: int, used: int) -> None:
        """Puts back, in the shared limiter, what a request has reserved and not used."""
        try:
            self._handle.settle.remote(name, tokens_per_minute, reserved, used)
        except Exception as error:  # within a minute the bucket is full again anyway
            log.warning("the limiter was not told what a request used: %s", error)

    async def _call(self, method: Any, *arguments: Any) -> LimitStatus:
        try:
            async with asyncio.timeout(_ANSWER_S):
                return LimitStatus(*await method.remote(*arguments))
        except Exception as error:  # Ray Serve raises many types for a deployment that does not answer
            log.warning("the limiter does not answer: %s: %s", type(error).__name__, error)
            message = "the limits of API keys cannot be looked up now; try again in a moment."
            raise RequestProblem(
                message, status=503, kind="server_error", code="limits_unavailable", retry_after_s=int(_ANSWER_S)
            ) from error
