"""Positions of lanes: the order of a step's rows, which rows come next, and how far each lane has come."""

from __future__ import annotations

import pytest

from apprentice.errors import TrainingError
from apprentice.train.batch import RowFacts
from apprentice.train.lane_position import (
    LanePosition,
    WindowShape,
    advance_position,
    in_step_order,
    skipped_drops,
    start_of_lanes,
)

SHAPE = WindowShape(positions=1024, lanes=2)


def rows(*places: tuple[int, int], count: int = 40, examples: int = 3) -> list[RowFacts]:
    """A row for each (window, row)."""
    return [
        RowFacts(window, row, [window * 1024 + number for number in range(examples)], [0] * examples, [1] * examples, {}, count)
        for window, row in places
    ]


def test_row_r_of_a_step_is_of_lane_r_mod_lanes() -> None:
    """However workers hand them in; a lane may have come to a later window than another."""
    step = rows((3, 0), (1, 39), (4, 7), (2, 3), (1, 38), (4, 8))
    places = [(fact.window, fact.row) for fact in in_step_order(step, 2)]
    assert places == [(2, 3), (1, 38), (4, 7), (1, 39), (4, 8), (3, 0)]


def test_lanes_with_different_numbers_of_rows_are_a_defect() -> None:
    with pytest.raises(TrainingError, match="a step has 3, 1 rows of the lanes, and not equally many"):
        in_step_order(rows((0, 0), (1, 0), (0, 1), (2, 0)), 2)


def test_the_example_is_true() -> None:
    lane = start_of_lanes(2)[1]
    assert lane == LanePosition(window=1)
    after = advance_position(lane, rows((3, 0), (3, 1)), SHAPE)
    assert after == LanePosition(window=3, row=2, window_rows=40, positions=1030)


def test_positions_of_all_lanes_add_up() -> None:
    """Two lanes at the ends of windows 2 and 3 have done the four windows 0 to 3, but for what was dropped of the last two."""
    lanes = start_of_lanes(2)
    for window in (0, 2):
        for row in range(2):
            lanes = tuple(
                advance_position(place, rows((window + lane, row), count=2, examples=512), SHAPE)
                for lane, place in enumerate(lanes)
            )
    assert [lane.positions for lane in lanes] == [2048, 2048]


def test_a_lane_passes_over_its_own_windows_without_rows() -> None:
    seen: list[int] = []

    def drops(window: int) -> dict[str, dict[str, int]] | None:
        seen.append(window)
        return {"sums": {"too_long": window}} if window in (3, 5) else None

    place = LanePosition(1, 40, 40, 1024)
    assert skipped_drops(place, rows((7, 0)), SHAPE, 9, drops) == [{"sums": {"too_long": 3}}, {"sums": {"too_long": 5}}]
    assert seen == [3, 5]
    for wrong in ((9, 0), (3, 1), (1, 39)):
        with pytest.raises(TrainingError, match=r"^step 9: the stream is at \(window, row\) "):
            skipped_drops(place, rows(wrong), SHAPE, 9, drops)
