"""Token bucket: an amount that is refilled evenly, `capacity` in a minute, and never beyond `capacity`."""

from __future__ import annotations

import math
from collections.abc import Callable


class TokenBucket:
    """A bucket that begins full; `capacity` may be changed at any time. `clock` gives seconds.

    `take` may leave less than nothing in it: whoever used more than was reserved pays with what comes next.
    """

    def __init__(self, capacity: int, clock: Callable[[], float]) -> None:
        self.capacity = capacity
        self._clock = clock
        self._level, self._measured_at = math.inf, clock()

    @property
    def level(self) -> float:
        """The amount in the bucket now."""
        refilled = (self._clock() - self._measured_at) * self.capacity / 60.0
        return min(float(self.capacity), self._level + refilled)

    def seconds_until(self, amount: float) -> float:
        """Seconds until the bucket holds `amount`; 0 if it does now."""
        return max(0.0, (amount - self.level) * 60.0 / self.capacity)

    def take(self, amount: float) -> None:
        """Takes `amount` out; a negative one is put back."""
        self._level, self._measured_at = self.level - amount, self._clock()
