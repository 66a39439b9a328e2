"""The order of one task's rows: pass after pass, each row once per pass, a different order every time, and all by arithmetic.

A pass shuffles the row groups, puts every `SHELF_GROUPS` of them in turn on one shelf, and shuffles the rows of a shelf.
So neighbours in the order come from few row groups, and no list of rows is ever shuffled. Knows nothing of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from apprentice.data.index.row_ranges import RowRanges
from apprentice.data.sampling.permutation import Numbers, draw, permute

SHELF_GROUPS = 8
_GROUP_ROUND = 2**32  # counters of the row groups' shuffles; those of the passes count up from 0


class _Pass(NamedTuple):
    """One pass over several shelves; places count kept rows in the order of the shuffled groups."""

    group_order: Numbers
    group_starts: Numbers  # place of each shuffled group's first row
    shelf_starts: Numbers  # and of each shelf's, with the end of the last


class RowOrder:
    """The endless order of the rows `kept` (source row numbers, ascending) of a source with row groups of `group_rows`."""

    def __init__(self, key: int, kept: Numbers | RowRanges, group_rows: Numbers) -> None:
        self.key = key
        self.kept = kept if isinstance(kept, RowRanges) else RowRanges.of(kept)
        self._group_rows = group_rows
        ends = self.kept.below(np.cumsum(group_rows))
        sizes = np.diff(ends, prepend=0)
        self._sizes: Numbers = sizes[sizes > 0].astype(np.int64)  # kept rows of each group that has any
        self._firsts: Numbers = np.cumsum(self._sizes) - self._sizes
        self._pass = lru_cache(maxsize=2)(self._shuffled)

    def __reduce__(self) -> tuple[type[RowOrder], tuple[int, RowRanges, Numbers]]:
        return type(self), (self.key, self.kept, self._group_rows)

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def has_shelves(self) -> bool:
        """False where all row groups go on one shelf; then the order of groups does not matter."""
        return len(self._sizes) > SHELF_GROUPS

    def shelves(self, passes: Numbers, offsets: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """(number, first place, rows) of the shelf that each offset in its pass falls on."""
        number, start, size = np.empty((3, len(passes)), dtype=np.int64)
        for pass_ in set(passes.tolist()):
            here = passes == pass_
            starts = self._pass(pass_).shelf_starts
            number[here] = shelf = np.searchsorted(starts, offsets[here], side="right") - 1
            start[here] = starts[shelf]
            size[here] = starts[shelf + 1] - starts[shelf]
        return number, start, size

    def rows(self, passes: Numbers, places: Numbers) -> Numbers:
        """Source row numbers at shuffled places: the start of the shelf plus a place on it."""
        if not self.has_shelves:
            return self.kept[places]
        found = np.empty_like(places)
        for pass_ in set(passes.tolist()):
            here = passes == pass_
            order, starts, _ = self._pass(pass_)
            group = np.searchsorted(starts, places[here], side="right") - 1
            found[here] = self._firsts[order[group]] + places[here] - starts[group]
        return self.kept[found]

    def _shuffled(self, pass_: int) -> _Pass:
        key = draw(self.key, np.array([_GROUP_ROUND + pass_]))
        order = np.argsort(draw(key, np.arange(len(self._sizes))), kind="stable")
        ends = np.cumsum(self._sizes[order])
        starts = ends - self._sizes[order]
        return _Pass(order, starts, np.append(starts[::SHELF_GROUPS], ends[-1]))


def drawn(orders: Sequence[RowOrder], which: Numbers, counts: Numbers) -> tuple[Numbers, Numbers]:
    """(source row, pass) of the draw numbered `counts[i]` of `orders[which[i]]`, for all i at once."""
    by_order, parts = runs(which)
    sizes, starts, shelves = np.zeros((3, len(which)), dtype=np.int64)
    keys = np.empty(len(which), dtype=np.uint64)
    for number, part in parts:
        sizes[part], keys[part] = len(orders[number]), orders[number].key
    passes, offsets = np.divmod(counts[by_order], sizes)
    for number, part in parts:
        if orders[number].has_shelves:
            shelves[part], starts[part], sizes[part] = orders[number].shelves(passes[part], offsets[part])
    # One call for all: that is where the time goes.
    places = starts + permute(offsets - starts, sizes, draw(draw(keys, passes), shelves))
    rows = np.empty((2, len(which)), dtype=np.int64)
    rows[1, by_order] = passes
    rows[0, by_order] = np.concatenate([places[:0], *(orders[number].rows(passes[part], places[part]) for number, part in parts)])
    return rows[0], rows[1]


def runs(labels: Numbers) -> tuple[Numbers, list[tuple[int, slice]]]:
    """The order that sorts `labels` and keeps equal ones as they come, and where each label then stands."""
    order = np.argsort(labels, kind="stable")
    found, starts = np.unique(labels[order], return_index=True)
    bounds = pairwise([*starts.tolist(), len(labels)])
    return order, [(label, slice(start, end)) for label, (start, end) in zip(found.tolist(), bounds, strict=True)]
