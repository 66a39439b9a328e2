"""The ledger of time: steps that a fault undid are lost, and all seconds stay in it."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from apprentice.run.time_ledger import MOST_BLOCKS, TimeLedger


def ledger_of(*steps: int, seconds: float = 2.0) -> TimeLedger:
    ledger = TimeLedger()
    for step in steps:
        ledger.enter_step(step, seconds)
    return ledger


def test_steps_after_the_checkpoint_are_lost() -> None:
    ledger = ledger_of(1, 2)
    ledger.begin_block()  # the checkpoint of step 2
    ledger.enter_step(3, 2.5)
    ledger.enter_step(4, 2.5)
    ledger.go_back(2)
    assert (ledger.seconds["steps"], ledger.seconds["lost_steps"]) == (4.0, 5.0)
    ledger.enter_step(3, 1.0)
    ledger.go_back(0)  # no checkpoint can be read any more
    assert (ledger.seconds["steps"], ledger.seconds["lost_steps"]) == (0.0, 10.0)


def test_a_checkpoint_inside_a_block() -> None:
    """It was saved in the background: two steps were made before it was known to be whole."""
    ledger = ledger_of(1, 2, 3, 4)
    ledger.begin_block()
    ledger.enter_step(5, 2.0)
    ledger.go_back(2)
    assert (ledger.seconds["steps"], ledger.seconds["lost_steps"]) == (4.0, 6.0)
    ledger.go_back(2)
    assert (ledger.seconds["steps"], ledger.seconds["lost_steps"]) == (4.0, 6.0)


def test_blocks_stay_few_and_no_second_is_lost_with_them() -> None:
    ledger = TimeLedger()
    for step in range(1, 1001):
        ledger.enter_step(step, 1.0)
        ledger.begin_block()
        ledger.begin_block()  # nothing happened since
    assert len(ledger.blocks) == MOST_BLOCKS
    assert ledger.seconds["steps"] == 1000
    ledger.go_back(990)
    assert ledger.seconds["lost_steps"] == pytest.approx(10)
    ledger.go_back(0)
    assert sum(ledger.seconds.values()) == pytest.approx(1000)


def test_goodput_and_its_sentence() -> None:
    ledger = ledger_of(1, 2, 3, seconds=30.0)
    ledger.enter("starting", 6.0)
    ledger.enter("stopped", 1000.0)
    ledger.enter("data", 4.0)
    assert ledger.goodput == pytest.approx(0.9)
    assert ledger.describe() == "goodput 90.0%, no fault; of 1,100 s: stopped 90.9%, steps 8.2%, starting 0.5%, data 0.4%"
    again = TimeLedger.from_status({"time": asdict(ledger)})
    assert again == ledger
    assert TimeLedger.from_status({}) is None
    assert TimeLedger().goodput == 0
