"""Ascending row numbers as runs of neighbours: nearly all rows of a source are kept, so a few runs say which.

What the plan holds then grows with the rows that are missing, not with those that are there. Knows nothing of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from apprentice.data.sampling.permutation import Numbers


class RowRanges:
    """`size` numbers in runs: run i begins with the number `firsts[i]`, which is the `places[i]`-th of all."""

    def __init__(self, firsts: Numbers, places: Numbers, size: int) -> None:
        self.firsts, self.places, self.size = firsts, places, size

    @classmethod
    def of(cls, numbers: Numbers) -> RowRanges:
        """Ascending numbers: [3, 4, 5, 9] are two runs, from 3 and from 9."""
        begins = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
        return cls(numbers[begins], begins.astype(np.int64), len(numbers))

    @classmethod
    def all_of(cls, rows: int) -> RowRanges:
        """0, 1, … rows - 1."""
        return cls(np.zeros(min(rows, 1), np.int64), np.zeros(min(rows, 1), np.int64), rows)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, places: Numbers | Sequence[int] | slice) -> Numbers:
        """The numbers at these places, like a list of them would give."""
        wanted = np.arange(*places.indices(self.size)) if isinstance(places, slice) else np.asarray(places, dtype=np.int64)
        run = np.searchsorted(self.places, wanted, side="right") - 1
        found: Numbers = self.firsts[run] + wanted - self.places[run]
        return found

    def below(self, bounds: Numbers) -> Numbers:
        """How many of the numbers are less than each bound."""
        if not self.size:
            return np.zeros(len(bounds), np.int64)
        run = np.searchsorted(self.firsts, bounds) - 1
        ends = np.append(self.places[1:], self.size)[run]
        return np.where(run < 0, 0, np.minimum(self.places[run] + bounds - self.firsts[run], ends))
