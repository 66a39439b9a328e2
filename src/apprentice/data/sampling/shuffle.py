"""Two-level shuffle of one task's rows: permutes the row groups, then the rows inside buffers of `BUFFER_GROUPS` (8) groups.

    row groups of the file        0  1  2 … 23
    permuted for a pass          17  4  9 … │ 2 21  0 … │ …     each buffer ("shelf") has 8 of them
    rows of each buffer          in a keyed permutation of all rows of its 8 groups

Every pass has each row once, in an order of its own. Neighbours in the order come from at most 8 row groups, so that reads stay
local. Orders are computed by keyed permutations; no list of rows is ever shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from apprentice.data.index.row_ranges import RowRanges
from apprentice.data.sampling.permutation import Numbers, draw, permute

BUFFER_GROUPS = 8
_GROUP_ROUND = 2**32  # counters of the row groups' permutations start here; those of the rows' count passes from 0


class _Pass(NamedTuple):
    """The permuted row groups of one pass; places count kept rows in the order of these groups."""

    group_order: Numbers
    group_starts: Numbers  # place of the first row of each group in `group_order`
    buffer_starts: Numbers  # place of the first row of each buffer, and behind them the end of the last


class RowOrder:
    """The endless order, pass after pass, of the rows `kept` of a source.

    `kept` are ascending source row numbers; `group_rows` are the sizes in rows of the source's row groups.
    """

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
    def has_buffers(self) -> bool:
        """False where all row groups fit into one buffer; then their order does not matter."""
        return len(self._sizes) > BUFFER_GROUPS

    def buffers(self, passes: Numbers, offsets: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """(number, first place, rows) of the buffer that each offset in its pass falls into."""
        number, start, size = np.empty((3, len(passes)), dtype=np.int64)
        for pass_ in set(passes.tolist()):
            here = passes == pass_
            starts = self._pass(pass_).buffer_starts
            number[here] = buffer = np.searchsorted(starts, offsets[here], side="right") - 1
            start[here] = starts[buffer]
            size[here] = starts[buffer + 1] - starts[buffer]
        return number, start, size

    def rows(self, passes: Numbers, places: Numbers) -> Numbers:
        """Source row numbers at `places` of each pass; a place is the start of a buffer plus a permuted offset in it."""
        if not self.has_buffers:
            return self.kept[places]
        indices = np.empty_like(places)
        for pass_ in set(passes.tolist()):
            here = passes == pass_
            order, starts, _ = self._pass(pass_)
            group = np.searchsorted(starts, places[here], side="right") - 1
            indices[here] = self._firsts[order[group]] + places[here] - starts[group]
        return self.kept[indices]

    def _shuffled(self, pass_: int) -> _Pass:
        key = draw(self.key, np.array([_GROUP_ROUND + pass_]))
        order = np.argsort(draw(key, np.arange(len(self._sizes))), kind="stable")
        ends = np.cumsum(self._sizes[order])
        starts = ends - self._sizes[order]
        return _Pass(order, starts, np.append(starts[::BUFFER_GROUPS], ends[-1]))


def draw_rows(orders: Sequence[RowOrder], which: Numbers, counts: Numbers) -> tuple[Numbers, Numbers]:
    """(source row, pass) of draw number `counts[i]` of `orders[which[i]]`, for all i at once; int64 arrays."""
    by_order, parts = group_equal(which)
    sizes, starts, buffers = np.zeros((3, len(which)), dtype=np.int64)
    keys = np.empty(len(which), dtype=np.uint64)
    for number, part in parts:
        sizes[part], keys[part] = len(orders[number]), orders[number].key
    passes, offsets = np.divmod(counts[by_order], sizes)
    for number, part in parts:
        if orders[number].has_buffers:
            buffers[part], starts[part], sizes[part] = orders[number].buffers(passes[part], offsets[part])
    # One call for all orders: most of the time is spent here.
    places = starts + permute(offsets - starts, sizes, draw(draw(keys, passes), buffers))
    rows = np.empty((2, len(which)), dtype=np.int64)
    rows[1, by_order] = passes
    rows[0, by_order] = np.concatenate([places[:0], *(orders[number].rows(passes[part], places[part]) for number, part in parts)])
    return rows[0], rows[1]


def group_equal(labels: Numbers) -> tuple[Numbers, list[tuple[int, slice]]]:
    """The stable sorting order of `labels`, and (label, its slice of the sorted array) for each distinct label."""
    order = np.argsort(labels, kind="stable")
    distinct, starts = np.unique(labels[order], return_index=True)
    bounds = pairwise([*starts.tolist(), len(labels)])
    return order, [(label, slice(start, end)) for label, (start, end) in zip(distinct.tolist(), bounds, strict=True)]
