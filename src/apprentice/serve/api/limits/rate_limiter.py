"""Rate limiter of API keys: for each key a token bucket of requests and one of tokens, refilled evenly in a minute.

`LocalRateLimits` counts inside the only replica; `shared_rate_limits` counts in one process for all replicas.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from apprentice.serve.api.limits.token_bucket import TokenBucket


class LimitStatus(NamedTuple):
    """The limiter's answer: seconds that a key must wait (0: not at all), and the requests and tokens that are left in its limits.

    `requests` and `tokens` are None where they are not limited, or were not looked up.
    """

    wait_s: float
    requests: float | None = None
    tokens: float | None = None


class RateLimits(Protocol):
    """Protocol of the rate limiter of all keys, in this process or shared among replicas (see `RateLimiter`).

    `admit` and `reserve` raise `RequestProblem` where a shared one cannot be reached.
    """

    def admit(self, name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> Awaitable[LimitStatus]:
        """Counts a request of the key `name` if it is admitted."""

    def reserve(self, name: str, tokens_per_minute: int, tokens: int) -> Awaitable[LimitStatus]:
        """Takes the `tokens` that a request may use, if they are left."""

    def settle(self, name: str, tokens_per_minute: int, reserved: int, used: int) -> None:
        """Puts back what a request has `reserved` and not `used`."""


class RateLimiter:
    """Counts requests and tokens of all keys. `clock` gives seconds.

    A request is admitted while both of its key's buckets hold at least 1. Before it runs, all tokens that it may use are taken out;
    when it has ended, those that it did not use are put back. So concurrent requests cannot use more than the limit together.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], TokenBucket] = {}  # by key and kind, requests or tokens

    def admit(self, name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> LimitStatus:
        """Counts a request of the key `name` if it is admitted, and says what is left or how long it must wait."""
        requests = self._bucket(name, "requests", requests_per_minute) if requests_per_minute is not None else None
        tokens = self._bucket(name, "tokens", tokens_per_minute) if tokens_per_minute is not None else None
        wait_s = max((bucket.seconds_until(1.0) for bucket in (requests, tokens) if bucket is not None), default=0.0)
        if requests is not None and not wait_s:
            requests.take(1.0)
        return LimitStatus(wait_s, *(None if bucket is None else bucket.level for bucket in (requests, tokens)))

    def reserve(self, name: str, tokens_per_minute: int, tokens: int) -> LimitStatus:
        """Takes `tokens` out of the bucket if it holds them, and says what is left or how long it takes until it does.

        A request for more than a minute's tokens waits for a full bucket, and takes all of it.
        """
        bucket = self._bucket(name, "tokens", tokens_per_minute)
        needed = min(tokens, tokens_per_minute)
        wait_s = bucket.seconds_until(needed)
        if not wait_s:
            bucket.take(needed)
        return LimitStatus(wait_s, tokens=bucket.level)

    def settle(self, name: str, tokens_per_minute: int, reserved: int, used: int) -> None:
        """Corrects the bucket at the end of a request that reserved `reserved` tokens and used `used`."""
        self._bucket(name, "tokens", tokens_per_minute).take(used - min(reserved, tokens_per_minute))

    def _bucket(self, name: str, kind: str, capacity: int) -> TokenBucket:
        """The bucket of a key, whose capacity is what the keys file says now."""
        bucket = self._buckets.setdefault((name, kind), TokenBucket(capacity, self._clock))
        bucket.capacity = capacity
        return bucket


class LocalRateLimits:
    """`RateLimits` inside the only replica."""

    def __init__(self, limiter: RateLimiter | None = None) -> None:
        self._limiter = limiter or RateLimiter()

    async def admit(self, name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> LimitStatus:
        """Counts a request of the key in this process, if it is admitted."""
        return self._limiter.admit(name, requests_per_minute, tokens_per_minute)

    async def reserve(self, name: str, tokens_per_minute: int, tokens: int) -> LimitStatus:
        """Takes the tokens that a request may use in this process, if they are left."""
        return self._limiter.reserve(name, tokens_per_minute, tokens)

    def settle(self, name: str, tokens_per_minute: int, reserved: int, used: int) -> None:
        """Puts back, in this process, what a request has reserved and not used."""
        self._limiter.settle(name, tokens_per_minute, reserved, used)
