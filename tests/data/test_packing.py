"""Packing: every example once and whole, best fit decreasing, and arrays that keep the examples apart."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.data.packing import build_encoder_decoder_rows, build_rows, decoder_inputs, pack, pack_two_sided

LENGTHS = st.lists(st.integers(1, 40), max_size=200)


def by_the_book(lengths: list[int], row_length: int) -> list[int]:
    """Rooms left over by best fit decreasing, with a search through all rows."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else row_length) - length)
    return sorted(rooms)


def test_the_example_of_the_docstring() -> None:
    assert pack([3, 5, 2], 5) == [[1], [0, 2]]
    assert pack([3, 5, 2], 5, "none") == pack([3, 5, 2], 5, "greedy") == [[0], [1], [2]]
    assert pack([], 5) == []


def test_the_fullest_row_with_room_is_taken() -> None:
    # 7 and 6 open rows with rooms 3 and 4; 3 fits both and goes to the fuller; 4 fills the other.
    assert pack([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]


def test_greedily_a_row_is_closed_by_what_does_not_fit() -> None:
    assert pack([2, 2, 2, 4, 1, 1], 5, "greedy") == [[0, 1], [2], [3, 4], [5]]
    assert pack_two_sided([(2, 1), (2, 2), (2, 1), (1, 3)], (5, 3), "greedy") == [[0, 1], [2], [3]]
    assert pack_two_sided([(2, 1), (2, 2)], (5, 3), "none") == [[0], [1]]


def test_pairs_fit_on_both_sides() -> None:
    # The second takes 9 of 10 on one side and leaves a room that no other fits; the rest share a row on both sides.
    assert pack_two_sided([(5, 2), (2, 9), (4, 6), (1, 2)], (10, 10)) == [[1], [2, 0, 3]]


PAIRS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), max_size=150)


@given(pairs=PAIRS, length=st.integers(40, 90), target_length=st.integers(12, 30), greedy=st.booleans())
def test_every_pair_once_and_within_both_lengths(
    pairs: list[tuple[int, int]], length: int, target_length: int, greedy: bool
) -> None:
    rows = pack_two_sided(pairs, (length, target_length), "greedy" if greedy else "best_fit")
    assert sorted(index for row in rows for index in row) == list(range(len(pairs)))
    loads = [(sum(pairs[index][0] for index in row), sum(pairs[index][1] for index in row)) for row in rows]
    assert all(load <= length and targets <= target_length for load, targets in loads)
    # No later row's examples would all have found room in an earlier one.
    fullest = [max(load / length, targets / target_length) for load, targets in loads]
    assert sum(share <= 0.5 for share in fullest) <= (1 if not greedy else len(rows))


@given(lengths=LENGTHS, row_length=st.integers(40, 90))
def test_every_example_once_whole_and_best_fit_decreasing(lengths: list[int], row_length: int) -> None:
    rows = pack(lengths, row_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in row) for row in rows]
    assert max(loads, default=0) <= row_length
    assert sorted(row_length - load for load in loads) == by_the_book(lengths, row_length)
    assert all(lengths[first] >= lengths[second] for row in rows for first, second in pairwise(row))


@pytest.mark.parametrize("lengths", [[6], [0], [3, -1]])
def test_what_no_row_can_hold_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="between 1 and 5"):
        pack(lengths, 5)


def test_arrays_of_two_rows() -> None:
    # Three examples: 10 11 | 12 (answer), 20 | 21 22 (answer), 30 | 31 (answer); padding has the id of an end token, 12.
    ids = np.array([10, 11, 12, 20, 21, 22, 30, 31], np.int32)
    rows = build_rows(ids, np.array([3, 3, 2]), np.array([2, 1, 1]), [[1], [0, 2]], 6, pad_id=12)
    assert rows["input_ids"].tolist() == [[20, 21, 22, 12, 12, 12], [10, 11, 12, 30, 31, 12]]
    assert rows["positions"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 0]]
    assert rows["segment_ids"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 2, 2, 0]]
    # By position: the 12 that ends an answer is trained on, the 12 that pads is not.
    assert rows["loss_mask"].tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 1, 0]]
    assert {name: array.dtype.name for name, array in rows.items()} == {
        "input_ids": "int32",
        "positions": "int32",
        "segment_ids": "int32",
        "loss_mask": "uint8",
    }


def test_arrays_of_two_sides() -> None:
    # Two examples in one row: 10 11 | 12 13 and 20 | 21; the answers lie on a side of their own.
    ids = np.array([10, 11, 12, 13, 20, 21], np.int32)
    rows = build_encoder_decoder_rows(ids, np.array([4, 2]), np.array([2, 1]), [[1, 0]], (4, 5), pad_id=0)
    assert rows["input_ids"].tolist() == [[20, 10, 11, 0]]
    assert rows["positions"].tolist() == [[0, 0, 1, 0]]
    assert rows["segment_ids"].tolist() == [[1, 2, 2, 0]]
    assert rows["target_ids"].tolist() == [[21, 12, 13, 0, 0]]
    assert rows["target_positions"].tolist() == [[0, 0, 1, 0, 1]]
    assert rows["target_segment_ids"].tolist() == [[1, 2, 2, 0, 0]]
    assert rows["loss_mask"].tolist() == [[1, 1, 1, 0, 0]]
    assert decoder_inputs(rows["target_ids"], rows["target_positions"], 7)[0, :3].tolist() == [7, 7, 12]


def test_no_rows_are_arrays_too() -> None:
    nothing = np.zeros(0, np.int64)
    rows = build_rows(nothing.astype(np.int32), nothing, nothing, [], 6, pad_id=0)
    assert {array.shape for array in rows.values()} == {(0, 6)}


@given(lengths=LENGTHS, data=st.data())
def test_examples_come_back_out_of_the_rows(lengths: list[int], data: st.DataObject) -> None:
    prompts = [data.draw(st.integers(0, length)) for length in lengths]
    ids = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    starts = np.cumsum([0, *lengths])
    packing = pack(lengths, 40)
    rows = build_rows(ids, np.array(lengths, np.int64), np.array(prompts, np.int64), packing, 40, pad_id=0)
    example_count = 0
    for number, row in enumerate(packing):
        for segment, index in enumerate(row, start=1):
            here = rows["segment_ids"][number] == segment
            assert rows["input_ids"][number, here].tolist() == ids[starts[index] : starts[index + 1]].tolist()
            assert rows["positions"][number, here].tolist() == list(range(lengths[index]))
            assert rows["loss_mask"][number, here].tolist() == [0] * prompts[index] + [1] * (lengths[index] - prompts[index])
            example_count += 1
        padding = rows["segment_ids"][number] == 0
        assert not rows["input_ids"][number, padding].any()
        assert not rows["loss_mask"][number, padding].any()
        assert rows["positions"][number, padding].tolist() == list(range(int(padding.sum())))
    assert example_count == len(lengths)
