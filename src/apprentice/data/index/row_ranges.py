"""Run-length encoding of ascending row numbers: nearly all rows of a source are kept, so that a few runs describe them.

    numbers   3 4 5 9        two runs
    firsts    3 9            first number of each run
    places    0 3            how many numbers come before each run

The plan's memory then grows with the number of missing rows, not of kept ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from apprentice.data.sampling.permutation import Numbers


class RowRanges:
    """A sequence of `size` ascending int64 numbers in runs: run i begins with `firsts[i]`, at index `places[i]`."""

    def __init__(self, firsts: Numbers, places: Numbers, size: int) -> None:
        self.firsts, self.places, self.size = firsts, places, size

    @classmethod
    def of(cls, numbers: Numbers) -> RowRanges:
        """Encodes ascending numbers: [3, 4, 5, 9] are two runs, from 3 and from 9."""
        begins = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
        return cls(numbers[begins], begins.astype(np.int64), len(numbers))

    @classmethod
    def all_of(cls, rows: int) -> RowRanges:
        """0, 1, … rows - 1."""
        return cls(np.zeros(min(rows, 1), np.int64), np.zeros(min(rows, 1), np.int64), rows)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, places: Numbers | Sequence[int] | slice) -> Numbers:
        """The numbers at these indices, as an array of all numbers would give."""
        indices = np.arange(*places.indices(self.size)) if isinstance(places, slice) else np.asarray(places, dtype=np.int64)
        run = np.searchsorted(self.places, indices, side="right") - 1
        numbers: Numbers = self.firsts[run] + indices - self.places[run]
        return numbers

    def below(self, bounds: Numbers) -> Numbers:
        """The number of elements less than each bound."""
        if not self.size:
            return np.zeros(len(bounds), np.int64)
        run = np.searchsorted(self.firsts, bounds) - 1
        ends = np.append(self.places[1:], self.size)[run]
        return np.where(run < 0, 0, np.minimum(self.places[run] + bounds - self.firsts[run], ends))
