"""Retry-After times of requests refused for overload: spread out, so that retries take little from requests that were admitted."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

_WINDOW_S = 10.0  # seconds over which the rate of replies is measured
_LEAST_RATE = 1.0  # retries a second where few replies have ended yet
_MOST_S = 60  # longest Retry-After in seconds


class RetrySchedule:
    """Gives each refused request a time of its own to retry, at half the rate at which replies end.

    The other half is left to admitted clients, who send further requests. Where 100 replies end in a second, 500 requests refused
    at once are told to retry after 1, 1, ... 2, ... 10 seconds. `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque()
        self._latest = -math.inf  # the latest retry time so far

    def record_end(self) -> None:
        """Counts a reply that has ended."""
        self._ends.append(self._clock())
        self._drop_old()

    def next_s(self) -> int:
        """Whole seconds after which one more refused request may retry, 1 to 60."""
        now = self._clock()
        self._drop_old()
        rate = max(_LEAST_RATE, len(self._ends) / _WINDOW_S / 2)
        self._latest = min(max(now, self._latest) + 1 / rate, now + _MOST_S)
        return max(1, math.ceil(self._latest - now))

    def _drop_old(self) -> None:
        while self._ends and self._ends[0] < self._clock() - _WINDOW_S:
            self._ends.popleft()
