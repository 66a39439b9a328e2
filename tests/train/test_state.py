"""When a run ends, and that its state survives JSON."""

from __future__ import annotations

import json

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
    assert goal.reached(State(step=4, positions=100)) == 0.5
    assert goal.reached(State(step=4, positions=201)) == 1.0


def test_state_survives_json() -> None:
    state = State(4, 2, 7, 900, 80, 130, 1.5, None, Ledger({0: 3}, {0: 12}, {"a": {"too_long": 1}}))
    assert State.from_json(json.loads(json.dumps(state.to_json()))) == state
