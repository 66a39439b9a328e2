"""When those who are refused may come again: one after another, so that refusing them takes little from those who are answered."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

_WINDOW_S = 10.0  # the pace of replies is that of so many seconds
_LEAST_PACE = 1.0  # a second, where little has ended yet
_MOST_S = 60  # nobody is sent away for longer


class Appointments:
    """Gives each refused request a time of its own, at half the pace at which replies end: those who got in ask again as well.

    Where 100 replies end in a second, 500 who are refused at once are told to come again after 1, 1, ... 2, ... 10 seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque()
        self._last = -math.inf  # the latest time that was given

    def ended(self) -> None:
        """A reply has ended."""
        self._ends.append(self._clock())
        self._forget()

    def next_s(self) -> int:
        """Whole seconds until one more may come again, 1 to 60."""
        now = self._clock()
        self._forget()
        pace = max(_LEAST_PACE, len(self._ends) / _WINDOW_S / 2)
        self._last = min(max(now, self._last) + 1 / pace, now + _MOST_S)
        return max(1, math.ceil(self._last - now))

    def _forget(self) -> None:
        while self._ends and self._ends[0] < self._clock() - _WINDOW_S:
            self._ends.popleft()
