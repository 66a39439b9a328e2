"""Runs of rows behave like the list of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from apprentice.data.index.row_ranges import RowRanges


@given(numbers=st.sets(st.integers(0, 60), min_size=1), bounds=st.lists(st.integers(0, 70)), data=st.data())
def test_they_are_what_the_list_is(numbers: set[int], bounds: list[int], data: st.DataObject) -> None:
    rows = np.array(sorted(numbers), np.int64)
    ranges = RowRanges.of(rows)
    places = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1))), np.int64)
    assert len(ranges) == len(rows)
    assert ranges[places].tolist() == rows[places].tolist()
    assert ranges[:7].tolist() == rows[:7].tolist()
    assert ranges.below(np.array(bounds, np.int64)).tolist() == np.searchsorted(rows, bounds).tolist()
    assert len(ranges.firsts) == sum(row - 1 not in numbers for row in numbers)


def test_none_and_all() -> None:
    none = np.zeros(0, np.int64)
    empty = RowRanges.of(none)
    assert (len(empty), empty[none].tolist(), empty.below(np.arange(3)).tolist()) == (0, [], [0, 0, 0])
    every = RowRanges.all_of(10**10)
    assert every[np.array([0, 10**10 - 1])].tolist() == [0, 10**10 - 1]
    assert every.below(np.array([5, 10**10, 10**11])).tolist() == [5, 10**10, 10**10]
