"""Account of one request: its deadline, the tokens that it takes from its key's limit, and how it ended, counted once."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Protocol

from apprentice.serve.api.keys import Key, Left
from apprentice.serve.api.schemas import RequestProblem, Usage

# Called once with the usage (None: no engine took the request), the time of the first token (`time.perf_counter`), the status.
OnClose = Callable[[Usage | None, float | None, int], None]


class Limits(Protocol):
    """Protocol of the rate limiter of all keys, in this process or shared among replicas (see `keys.Limiter`).

    `admit` and `reserve` raise `RequestProblem` where a shared one cannot be reached.
    """

    def admit(self, name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> Awaitable[Left]: ...

    def reserve(self, name: str, tokens_per_minute: int, tokens: int) -> Awaitable[Left]: ...

    def settle(self, name: str, tokens_per_minute: int, reserved: int, used: int) -> None: ...


class Standing:
    """A key's limits and what is `left` of them, as response headers."""

    def __init__(self, key: Key, left: Left) -> None:
        self.key, self.left = key, left

    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-…` headers: the limit, what remains of it, and the seconds until it is full again."""
        found = {}
        for kind, limit, left in (
            ("requests", self.key.requests_per_minute, self.left.requests),
            ("tokens", self.key.tokens_per_minute, self.left.tokens),
        ):
            if limit is not None and left is not None:
                found[f"x-ratelimit-limit-{kind}"] = str(limit)
                found[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(left)))
                found[f"x-ratelimit-reset-{kind}"] = f"{math.ceil((limit - left) * 60.0 / limit)}s"
        return found


class Account:
    """Account of a request that has just arrived; `deadline` is in seconds on the event loop's clock."""

    def __init__(
        self, deadline: float, limits: Limits | None, key: Key | None, on_close: OnClose, standing: Standing | None = None
    ) -> None:
        self.deadline = deadline
        self._standing = standing
        self._limits, self._key = limits, key
        self._on_close = on_close
        self._reserved = 0
        self._is_open = True

    async def reserve(self, tokens: int) -> None:
        """Takes the tokens that the request may use from its key's limit.

        Raises `RequestProblem` (status 429) where too few are left.
        """
        if self._limits is None or self._key is None or self._key.tokens_per_minute is None:
            return
        left = await self._limits.reserve(self._key.name, self._key.tokens_per_minute, tokens)
        if self._standing is not None:
            self._standing.left = self._standing.left._replace(tokens=left.tokens)
        if left.wait_s > 0:
            raise limit_reached(self._key, left.wait_s)
        self._reserved = tokens

    def close(self, usage: Usage | None, first: float | None, status: int) -> None:
        """Ends the account: tokens that were not used go back to the key's limit. Only the first call counts."""
        if not self._is_open:
            return
        self._is_open = False
        if self._reserved and self._limits is not None and self._key is not None and self._key.tokens_per_minute is not None:
            used = 0 if usage is None else usage.prompt + usage.completion
            self._limits.settle(self._key.name, self._key.tokens_per_minute, self._reserved, used)
        self._on_close(usage, first, status)


def limit_reached(key: Key, wait_s: float) -> RequestProblem:
    """Refusal (status 429) of a key that may send requests again in `wait_s` seconds."""
    seconds = math.ceil(wait_s)
    message = f"key {key.name!r} has used what it may in a minute, or its running requests may; try again in {seconds} s."
    return RequestProblem(message, status=429, kind="rate_limit_error", code="rate_limit_exceeded", retry_after_s=seconds)
