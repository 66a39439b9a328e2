"""Reproducible random draws from a text key: the same key gives the same draws on every machine and Python version.

Python's `random` promises that only for `random()`, and the built-in rows must never change within a version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class SeededRandom:
    """Counter-based random generator: draw n is a SHA-256 hash of (key, n)."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._drawn = 0

    def below(self, count: int) -> int:
        """An integer from 0 to `count` - 1."""
        digest = hashlib.sha256(f"{self._key}/{self._drawn}".encode()).digest()
        self._drawn += 1
        return int.from_bytes(digest[:8], "big") % count

    def between(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def one(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different options, in random order. Raises `ValueError` if there are fewer."""
        if count > len(options):
            raise ValueError(f"{count} of {len(options)} options")
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """All options in random order."""
        return self.some(options, len(options))
