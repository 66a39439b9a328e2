"""When a run ends, and that its state survives JSON."""

from __future__ import annotations

import json

from apprentice.train.lane_position import LanePosition
from apprentice.train.metrics.mixture_ledger import Ledger
from apprentice.train.state import Goal, State


def test_steps() -> None:
    goal = Goal(10)
    assert [goal.reached(State(step=step)) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert goal.expected_steps(State(step=3)) == 10


def test_tokens_end_with_the_step_that_crosses() -> None:
    goal = Goal(10, tokens=1000)
    assert goal.reached(State(step=8, tokens=999)) < 1.0
    assert goal.reached(State(step=9, tokens=1040)) == 1.0
    assert goal.expected_steps(State(step=2, tokens=300)) == 10  # too early to trust
    assert goal.expected_steps(State(step=6, tokens=500)) == 12
    assert goal.expected_steps(State(step=9, tokens=1040)) == 9


def test_positions() -> None:
    goal = Goal(10, positions=200)
    assert goal.reached(State(step=4, lanes=(LanePosition(positions=40), LanePosition(positions=60)))) == 0.5
    assert goal.reached(State(step=4, lanes=(LanePosition(positions=201),))) == 1.0


def test_state_survives_json() -> None:
    ledger = Ledger({0: 3}, {0: 12}, {"a": {"too_long": 1}})
    for lanes in ((LanePosition(2, 7, 9, 130),), (LanePosition(2, 7, 9, 130), LanePosition(5, 1, None, 260))):
        state = State(4, lanes, 900, 80, 1.5, None, ledger)
        assert State.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_the_state_of_one_lane_is_written_as_before_there_were_lanes() -> None:
    """`window`, `row`, `window_rows` and `positions` are keys of their own; the oldest checkpoints have no `window_rows`."""
    state = State(4, (LanePosition(2, 7, 9, 130),), 900, 80, 1.5)
    before = {
        "step": 4,
        "window": 2,
        "row": 7,
        "tokens": 900,
        "target_tokens": 80,
        "positions": 130,
        "loss": 1.5,
        "validation_loss": None,
        "ledger": {"examples": {}, "targets": {}, "dropped": {}},
        "loss_scaling": None,
        "window_rows": 9,
    }
    assert state.to_json() == before
    assert State.from_json(before) == state
    del before["window_rows"], before["loss_scaling"]
    assert State.from_json(before).lanes == (LanePosition(2, 7, None, 130),)
