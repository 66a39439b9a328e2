"""Account of one request: its deadline, the tokens that it takes from its key's limit, and how it ended, counted once."""

from __future__ import annotations

import math
from collections.abc import Callable

from apprentice.serve.api.limits.api_keys import ApiKey
from apprentice.serve.api.limits.rate_limiter import LimitStatus, RateLimits
from apprentice.serve.api.schemas.problems import RequestProblem
from apprentice.serve.api.schemas.responses import Usage

# Called once with the usage (None: no engine took the request), the time of the first token (`time.perf_counter`), the status.
OnClose = Callable[[Usage | None, float | None, int], None]


class RateLimitState:
    """A key's limits, and the `status` of them that its latest request has left."""

    def __init__(self, key: ApiKey, status: LimitStatus) -> None:
        self.key, self.status = key, status

    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-…` headers: the limit, what remains of it, and the seconds until it is full again."""
        headers = {}
        for kind, limit, remaining in (
            ("requests", self.key.requests_per_minute, self.status.requests),
            ("tokens", self.key.tokens_per_minute, self.status.tokens),
        ):
            if limit is not None and remaining is not None:
                headers[f"x-ratelimit-limit-{kind}"] = str(limit)
                headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(remaining)))
                headers[f"x-ratelimit-reset-{kind}"] = f"{math.ceil((limit - remaining) * 60.0 / limit)}s"
        return headers


class Account:
    """Account of a request that has just arrived; `deadline` is in seconds on the event loop's clock."""

    def __init__(
        self,
        deadline: float,
        limits: RateLimits | None,
        key: ApiKey | None,
        on_close: OnClose,
        limit_state: RateLimitState | None = None,
    ) -> None:
        self.deadline = deadline
        self._limit_state = limit_state
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
        status = await self._limits.reserve(self._key.name, self._key.tokens_per_minute, tokens)
        if self._limit_state is not None:
            self._limit_state.status = self._limit_state.status._replace(tokens=status.tokens)
        if status.wait_s > 0:
            raise rate_limit_problem(self._key, status.wait_s)
        self._reserved = tokens

    def close(self, usage: Usage | None, first_token_at: float | None, status: int) -> None:
        """Ends the account: tokens that were not used go back to the key's limit. Only the first call counts."""
        if not self._is_open:
            return
        self._is_open = False
        if self._reserved and self._limits is not None and self._key is not None and self._key.tokens_per_minute is not None:
            used = 0 if usage is None else usage.total_tokens
            self._limits.settle(self._key.name, self._key.tokens_per_minute, self._reserved, used)
        self._on_close(usage, first_token_at, status)


def rate_limit_problem(key: ApiKey, wait_s: float) -> RequestProblem:
    """Refusal (status 429) of a key that may send requests again in `wait_s` seconds."""
    seconds = math.ceil(wait_s)
    message = f"key {key.name!r} has used what it may in a minute, or its running requests may; try again in {seconds} s."
    return RequestProblem(message, status=429, kind="rate_limit_error", code="rate_limit_exceeded", retry_after_s=seconds)
