"""Position of a lane in its stream of packed rows: checks that a step's rows come next, and moves on past them.

With windows of 1,024 positions and two lanes, lane 1 reads the windows 1, 3, 5 … After two rows of window 3, which has 40 rows,
with 6 examples in them, its position is `LanePosition(window=3, row=2, window_rows=40, positions=1030)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from apprentice.errors import TrainingError
from apprentice.train.metrics.mixture_ledger import DropCounts

if TYPE_CHECKING:  # batch.py imports torch, which takes seconds and is not needed here
    from apprentice.train.batch import RowFacts


class LanePosition(NamedTuple):
    """`window` and `row` name the lane's packed row that comes next.

    `window_rows` is the number of rows in `window`; None where no row of it was trained on, or where it was not recorded (earlier
    versions). `positions` counts those of the sampling plan: all of the lane's earlier windows, and the examples of `window` that
    were trained on.
    """

    window: int = 0
    row: int = 0
    window_rows: int | None = None
    positions: int = 0


@dataclass(frozen=True)
class WindowShape:
    """Sizes that tell which rows come next: positions in a window, lanes, and rows in a window where all have the same number."""

    positions: int
    lanes: int = 1
    rows: int | None = None


def start_of_lanes(lanes: int) -> tuple[LanePosition, ...]:
    """The positions of all lanes before the first step."""
    return tuple(LanePosition(window=lane) for lane in range(lanes))


def in_step_order(rows: Sequence[RowFacts], lanes: int) -> list[RowFacts]:
    """The rows of a step in one order: row r is of lane r mod `lanes`, and each lane's rows are in the order of its stream.

    Raises `TrainingError` if lanes have different numbers of rows.
    """
    ordered = sorted(rows, key=lambda fact: (fact.window, fact.row))
    by_lane = [[fact for fact in ordered if fact.window % lanes == lane] for lane in range(lanes)]
    if len({len(part) for part in by_lane}) > 1:
        counts = ", ".join(str(len(part)) for part in by_lane)
        raise TrainingError(f"a step has {counts} rows of the lanes, and not equally many; this is a defect of the data pipeline.")
    return list(chain.from_iterable(zip(*by_lane, strict=True)))


def skipped_drops(
    place: LanePosition,
    rows: Sequence[RowFacts],
    shape: WindowShape,
    step: int,
    drops_of_empty: Callable[[int], DropCounts | None],
) -> list[DropCounts]:
    """Drop counts of the windows that a lane's rows of `step` skip, which must be empty ones: `drops_of_empty` gives theirs.

    Raises `TrainingError` unless the rows are the lane's next ones and hold only examples of their own window. After row (window 3,
    row 4) of a single lane comes (3, 5), or (4, 0) if window 3 has five rows.
    """
    skipped: list[DropCounts] = []
    window, row, count = place.window, place.row, shape.rows or place.window_rows
    for fact in rows:
        if (fact.window, fact.row) != (window, row):
            has_ended = row in (0, count) or count is None  # a checkpoint of an earlier version does not say
            between = range(window + shape.lanes * (row > 0), fact.window, shape.lanes)
            may_skip = fact.row == 0 and fact.window > window and has_ended
            if not may_skip or (drops := _drops_of_all(between, drops_of_empty)) is None:
                raise TrainingError(
                    f"step {step}: the stream is at (window, row) {(fact.window, fact.row)} where {(window, row)} comes"
                    " next; restore the index that the run was made with, or report this as a defect of the data pipeline."
                )
            skipped += drops
        if foreign := [position for position in fact.examples if position // shape.positions != fact.window]:
            raise TrainingError(
                f"step {step}: row {fact.row} of window {fact.window} holds the plan's position {foreign[0]}, which is"
                f" of window {foreign[0] // shape.positions}; this is a defect of the data pipeline."
            )
        window, row, count = fact.window, fact.row + 1, shape.rows or fact.window_rows
    return skipped


def _drops_of_all(windows: range, drops_of_empty: Callable[[int], DropCounts | None]) -> list[DropCounts] | None:
    """Drop counts of windows without rows; None if one of them has rows."""
    counts: list[DropCounts] = []
    for window in windows:
        if (drops := drops_of_empty(window)) is None:
            return None
        counts.append(drops)
    return counts


def advance_position(place: LanePosition, rows: Sequence[RowFacts], shape: WindowShape) -> LanePosition:
    """The position of a lane after `rows`, its rows of one step."""
    last = rows[-1]
    of_earlier = last.window // shape.lanes * shape.positions  # all positions of earlier windows are done, dropped ones too
    begins_anew = last.window != place.window or place.positions < of_earlier
    positions = of_earlier if begins_anew else place.positions
    positions += sum(len(fact.examples) for fact in rows if fact.window == last.window)
    return LanePosition(last.window, last.row + 1, last.window_rows, positions)
