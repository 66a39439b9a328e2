"""The keeper of time: what each second of a call is entered as, from the records as they come."""

from __future__ import annotations

from typing import Any

import pytest

from apprentice.run.time_ledger import TimeLedger
from apprentice.train.metrics.time_keeper import TimeKeeper

WALL = 1_000_000.0  # of the monotonic clock's 0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def keeper_at(clock: Clock, ledger: TimeLedger | None = None, wall: float = WALL) -> TimeKeeper:
    return TimeKeeper(ledger, clock, lambda: wall + clock.now)


def step(number: int, at: float, seconds: float = 2.0, waited: float = 0.5) -> dict[str, Any]:
    return {"step": number, "loss": 1.0, "seconds": seconds, "data_wait_s": waited, "at": at}


def entered(keeper: TimeKeeper) -> dict[str, float]:
    return {kind: seconds for kind, seconds in keeper.ledger.seconds.items() if seconds}


def test_a_call_without_a_fault() -> None:
    clock = Clock()
    keeper = keeper_at(clock)
    with keeper.spending("nodes"):
        clock.now = 107.0
    records = [
        {"phase": "starting", "is_fault": False, "at": 108.0},
        step(1, at=130.0, seconds=4.0, waited=2.5),  # rows came at 128.5
        step(2, at=132.0),
        {"step": 2, "validation_loss": 1.0, "at": 135.0},
        step(3, at=138.0),  # began at 136, after a second for the checkpoint
        {"step": 2, "saved_s": 2.0, "at": 138.5},
        {"step": 3, "memory": {}, "at": 140.0},
    ]
    news = [keeper.take(record) for record in records]
    assert news == [True] + [False] * 6
    assert all("at" not in record for record in records)
    clock.now = 141.0
    keeper.end("person")
    assert entered(keeper) == {
        "nodes": 7.0,
        "starting": 21.5,
        "steps": 1.5 + 1.5 + 1.5,
        "data": 1.0,
        "validation": 3.0,
        "checkpoints": 1.0 + 2.0 + 1.0,
    }
    assert sum(entered(keeper).values()) == 41.0
    assert (keeper.ledger.faults, keeper.ledger.at, keeper.ledger.end) == (0, WALL + 141.0, "person")


def test_a_worker_that_dies() -> None:
    """Two steps are made again, and the one that it died in counts for nothing."""
    clock = Clock()
    keeper = keeper_at(clock)
    keeper.take({"phase": "starting", "at": 100.0})
    keeper.take(step(1, at=102.0, waited=0.0))
    keeper.take({"step": 1, "saved_s": 0.1, "at": 102.0})
    keeper.take(step(2, at=104.0, waited=0.0))
    keeper.take(step(3, at=106.0, waited=0.0))
    keeper.take({"phase": "starting", "is_fault": True, "at": 107.5})
    keeper.take({"phase": "nodes", "is_fault": False, "at": 110.0})
    keeper.take({"phase": "starting", "is_fault": False, "at": 150.0})
    keeper.take(step(2, at=182.0, waited=0.0))
    assert entered(keeper) == {"steps": 4.0, "lost_steps": 5.5, "starting": 32.5, "nodes": 40.0}
    assert keeper.ledger.faults == 1
    keeper.take(step(3, at=184.0, waited=0.0))
    keeper.take({"phase": "starting", "is_fault": False, "at": 189.0})  # it grew at a checkpoint: no fault
    assert entered(keeper)["starting"] == 37.5
    assert keeper.ledger.faults == 1


@pytest.mark.parametrize(("end", "kind", "faults"), [("person", "stopped", 0), ("fault", "down", 1), ("", "down", 1)])
def test_the_time_between_two_calls(end: str, kind: str, faults: int) -> None:
    """A killed driver ends nothing: its ledger is what it last wrote, and the next call counts the fault."""
    clock = Clock()
    first = keeper_at(clock)
    first.take(step(1, at=102.0, waited=0.0))
    first.take(step(2, at=104.0, waited=0.0))
    clock.now = 105.0
    if end:
        first.end(end)
    later = Clock()
    later.now = 7.0  # the machine was started anew
    second = keeper_at(later, first.ledger, wall=WALL + 200.0 - 7.0)
    second.take(step(2, at=37.0, waited=0.0))
    seconds = entered(second)
    assert seconds[kind] == pytest.approx(95.0 if end else 96.0)
    assert seconds["lost_steps"] == (3.0 if end else 2.0)
    assert seconds["starting"] == 28.0
    assert second.ledger.faults == faults
    assert sum(seconds.values()) == pytest.approx(130.0)


def test_a_clock_that_was_set_back_between_two_calls() -> None:
    clock = Clock()
    keeper = keeper_at(clock, TimeLedger(at=WALL + 5000.0, end="person"))
    assert entered(keeper) == {}


def test_waiting_is_entered_while_it_lasts() -> None:
    clock = Clock()
    keeper = keeper_at(clock)
    clock.now = 160.0
    keeper.pass_time()
    assert entered(keeper) == {"starting": 60.0}
    keeper.take(step(1, at=162.0))
    clock.now = 170.0
    keeper.pass_time()  # a step is being made
    assert sum(entered(keeper).values()) == 62.0
