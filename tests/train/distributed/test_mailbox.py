"""The mailbox: records, requests for a checkpoint, failures, and workers without a heartbeat."""

from __future__ import annotations

import pytest

from apprentice.errors import DataError, TrainingError
from apprentice.train.distributed import mailbox as mailbox_module
from apprentice.train.distributed.heartbeat import WorkerProcess
from apprentice.train.distributed.mailbox import Mailbox


def test_mailbox() -> None:
    mailbox = Mailbox()
    mailbox.begin_attempt(None)
    assert mailbox.join() == (1, None, False)
    mailbox.add_record({"step": 1, "steps": 2})
    mailbox.add_record({"step": 2, "steps": 2})
    for _ in range(2):  # the first answer may have been lost
        assert [record.get("step", record.get("phase")) for record in mailbox.take_records()] == ["starting", 1, 2]
    mailbox.add_record({"step": 3, "steps": 3})
    assert [record["step"] for record in mailbox.take_records(3)] == [3]
    assert mailbox.take_records(4) == []
    first = TrainingError("first")
    mailbox.record_failure(first)
    mailbox.record_failure(DataError("second"))
    mailbox.begin_attempt(None)
    assert mailbox.join() == (2, None, True)
    assert mailbox.outcome() == (2, first, [])


def test_running_out_of_memory_halves_the_micro_batch_once() -> None:
    mailbox = Mailbox(2)
    mailbox.begin_attempt(None)
    assert mailbox.largest_micro_batch() is None
    for _ in range(2):  # both workers ran out in the same step
        mailbox.halve_micro_batch(6)
    assert mailbox.largest_micro_batch() == 3
    mailbox.halve_micro_batch(3)
    assert mailbox.largest_micro_batch() == 1
    messages = [record["message"] for record in mailbox.take_records() if "message" in record]
    assert len(messages) == 2
    assert messages[0] == (
        "a worker ran out of memory with 6 rows at once; training goes on from its newest checkpoint with at most 3, the same rows"
        " in each step"
    )


def test_phases_of_an_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy forgets the workers of a group that has failed, again and again while it waits for nodes."""
    clock = iter(range(100))
    monkeypatch.setattr(mailbox_module.time, "monotonic", lambda: float(next(clock)))
    mailbox = Mailbox()
    mailbox.forget_workers()  # before the first attempt
    mailbox.begin_attempt(None)
    mailbox.add_record({"step": 1, "steps": 2})
    mailbox.forget_workers()
    mailbox.wait_for_nodes("there is no room")
    mailbox.forget_workers()
    mailbox.begin_attempt(None)
    mailbox.begin_attempt(None)  # it grew at a checkpoint
    mailbox.add_record({"step": 2, "steps": 2, "memory": {"peak": 1}})
    mailbox.forget_workers()  # all steps had been made
    records = mailbox.take_records()
    assert [(record.get("phase"), record.get("is_fault"), record.get("at")) for record in records] == [
        ("starting", False, 0.0),
        (None, None, 1.0),
        ("starting", True, 2.0),
        ("nodes", False, 3.0),
        (None, None, None),
        ("starting", False, 4.0),
        ("starting", False, 5.0),
        (None, None, 6.0),
    ]


def test_the_wish_for_a_checkpoint() -> None:
    mailbox = Mailbox(2)
    assert mailbox.begin_attempt(None) == 2
    worker = WorkerProcess(0, 11, "abc", "10.0.0.1")
    assert mailbox.beat(1, worker) == 0
    mailbox.request_checkpoint()
    assert mailbox.beat(1, worker) == 1
    mailbox.add_record({"attempt": 1, "step": 1, "steps": 4})
    assert mailbox.is_checkpoint_requested()
    mailbox.add_record({"attempt": 1, "step": 1, "steps": 4, "saved_s": 2.0, "blocked_s": 0.1})
    assert not mailbox.is_checkpoint_requested()
    mailbox.resize(1)
    assert mailbox.begin_attempt(None) == 1
    assert mailbox.beat(2, worker) == 0  # the new workers begin at a checkpoint
    assert [record["message"] for record in mailbox.take_records() if "message" in record] == [
        "training goes on with 1 worker instead of 2"
    ]


def test_silent_workers_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 0.0, 1.0, 11.0, 11.0, 12.0, 13.0, 14.0, 50.0])
    monkeypatch.setattr(mailbox_module.time, "monotonic", lambda: next(clock))
    mailbox = Mailbox(2)
    mailbox.begin_attempt(None)
    mailbox.add_record({"attempt": 1, "step": 3, "steps": 4})
    first, second = WorkerProcess(0, 11, "abc", "10.0.0.1"), WorkerProcess(1, 12, "def", "10.0.0.2")
    mailbox.beat(1, first)
    mailbox.beat(1, second)
    mailbox.beat(1, first)
    assert mailbox.find_silent_workers(10.0) == []
    assert mailbox.find_silent_workers(10.0) == [second]
    mailbox.beat(1, second)  # too late
    assert mailbox.find_silent_workers(10.0) == [second]
    mailbox.forget_workers()
    assert mailbox.find_silent_workers(10.0) == []
    sentence = "worker 1 (process 12 on 10.0.0.2) had not answered for 10 seconds and was ended"
    assert mailbox.outcome().silent == [sentence]
    assert mailbox.take_records()[-2] == {"attempt": 1, "step": 3, "steps": 4, "message": sentence}


def test_only_this_attempts_workers_are_listened_for() -> None:
    mailbox = Mailbox(1)
    mailbox.begin_attempt(None)
    mailbox.begin_attempt(None)
    mailbox.beat(1, WorkerProcess(0, 11, "abc", "10.0.0.1"))
    assert mailbox.find_silent_workers(-1.0) == []
    mailbox.beat(2, WorkerProcess(0, 12, "abc", "10.0.0.1"))
    mailbox.leave(0)
    assert mailbox.find_silent_workers(-1.0) == []
