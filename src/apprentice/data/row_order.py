"""The order of one task's rows: pass after pass, each row once per pass, a different order every time, and all by arithmetic.

A pass shuffles the row groups, puts every `SHELF_GROUPS` of them in turn on one shelf, and shuffles the rows of a shelf.
So neighbours in the order come from few row groups, and no list of rows is ever shuffled. Knows nothing of tasks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from apprentice.data.permutation import Keys, Numbers, draw, permute

SHELF_GROUPS = 8
_GROUP_ROUND = 2**32  # counters of the row groups' shuffles; those of the shelves' count up from 0


class _Pass(NamedTuple):
    """One pass over several shelves; places count kept rows in the order of the shuffled groups."""

    group_order: Numbers
    group_starts: Numbers  # place of each shuffled group's first row
    shelf_starts: Numbers  # and of each shelf's, with the end of the last


class Span(NamedTuple):
    """For some draws of one task: the place on its shelf, the shelf's rows, its first place, and the key that shuffles it."""

    within: Numbers
    sizes: Numbers
    starts: Numbers
    keys: Keys


class RowOrder:
    """The endless order of the rows `kept` (source row numbers, ascending) of a source with row groups of `group_rows`."""

    def __init__(self, key: int, kept: Numbers, group_rows: Numbers) -> None:
        self.kept = kept
        self._key = key
        self._source_group_rows = group_rows
        ends = np.searchsorted(kept, np.cumsum(group_rows))
        sizes = np.diff(ends, prepend=0)
        self._sizes: Numbers = sizes[sizes > 0].astype(np.int64)  # kept rows of each group that has any
        self._firsts: Numbers = np.cumsum(self._sizes) - self._sizes
        self._pass = lru_cache(maxsize=2)(self._shuffled)

    def __reduce__(self) -> tuple[type[RowOrder], tuple[int, Numbers, Numbers]]:
        return type(self), (self._key, self.kept, self._source_group_rows)

    def __len__(self) -> int:
        return len(self.kept)

    def spans(self, counts: Numbers) -> Span:
        """Where the shelves' shuffle has to look for the draws numbered `counts` of this task."""
        passes, offsets = np.divmod(counts, len(self.kept))
        pass_keys = draw(self._key, passes)
        if len(self._sizes) <= SHELF_GROUPS:
            return Span(offsets, np.full_like(offsets, len(self.kept)), np.zeros_like(offsets), pass_keys)
        sizes, starts, shelves = np.empty_like(offsets), np.empty_like(offsets), np.empty_like(offsets)
        for number in np.unique(passes):
            here = passes == number
            shelf_starts = self._pass(int(number)).shelf_starts
            shelf = np.searchsorted(shelf_starts, offsets[here], side="right") - 1
            shelves[here], starts[here] = shelf, shelf_starts[shelf]
            sizes[here] = shelf_starts[shelf + 1] - shelf_starts[shelf]
        return Span(offsets - starts, sizes, starts, draw(pass_keys, shelves))

    def rows(self, counts: Numbers, places: Numbers) -> Numbers:
        """Source row numbers at the shuffled `places` (shelf's start plus place on it) of the draws numbered `counts`."""
        if len(self._sizes) <= SHELF_GROUPS:
            return self.kept[places]
        passes = counts // len(self.kept)
        found = np.empty_like(places)
        for number in np.unique(passes):
            here = passes == number
            order, group_starts, _ = self._pass(int(number))
            group = np.searchsorted(group_starts, places[here], side="right") - 1
            found[here] = self._firsts[order[group]] + places[here] - group_starts[group]
        return self.kept[found]

    def _shuffled(self, number: int) -> _Pass:
        groups = len(self._sizes)
        key = draw(self._key, np.array(_GROUP_ROUND + number))
        order = permute(np.arange(groups), groups, key)
        ends = np.cumsum(self._sizes[order])
        starts = ends - self._sizes[order]
        return _Pass(order, starts, np.append(starts[::SHELF_GROUPS], ends[-1]))
