"""What the driver writes of a run's records."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path
from typing import Any

from apprentice.artifacts import Run
from apprentice.errors import DataError, TrainingError, full_disk
from apprentice.storage import Folder
from apprentice.train.tracking import Mailbox, Tracker


def record(step: int, attempt: int = 1, **more: Any) -> dict[str, Any]:
    figures = {"loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0, "tokens": 100, "seconds": 2.0, "data_wait_s": 0.5}
    return {
        "attempt": attempt,
        "step": step,
        "steps": 4,
        "tokens_per_s": 50.0,
        "data_wait": 0.25,
        "examples": [step],
        **figures,
        **more,
    }


def test_mailbox() -> None:
    mailbox = Mailbox()
    mailbox.begin(None)
    assert mailbox.start() == (1, None, False)
    mailbox.put({"step": 1})
    mailbox.put({"step": 2})
    assert mailbox.take() == [{"step": 1}, {"step": 2}]
    assert mailbox.take() == []
    first = TrainingError("first")
    mailbox.fail(first)
    mailbox.fail(DataError("second"))
    mailbox.begin(None)
    assert mailbox.start() == (2, None, True)
    assert mailbox.outcome() == (2, first)


def test_tracker(tmp_path: Path) -> None:
    run = Run(Folder.at(tmp_path / "run").make())
    seen: list[dict[str, Any]] = []
    tracker = Tracker(run, seen.append)
    for given in (record(1), record(2), record(2, attempt=2), record(3, attempt=2)):
        tracker.write(given)
    tracker.write({"attempt": 2, "step": 4, "steps": 4, "validation_loss": 1.5})
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [(line["attempt"], line["step"]) for line in lines] == [(1, 1), (1, 2), (2, 2), (2, 3), (2, 4)]
    assert lines[3]["examples"] == [3]
    assert [("examples" in one) for one in seen] == [False] * 5
    assert (tracker.tokens, tracker.seconds, tracker.waited) == (200, 4.0, 1.0)  # the first step of each attempt warms up
    assert run.status()["validation_loss"] == 1.5
    assert run.status()["state"] == "training"
    assert len(list((tmp_path / "run" / "events").iterdir())) == 1


def test_a_second_tracker_goes_on_in_the_same_file(tmp_path: Path) -> None:
    run = Run(Folder.at(tmp_path / "run").make())
    for step in (1, 2):
        tracker = Tracker(run, lambda _: None)
        tracker.write(record(step))
        tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [(line["attempt"], line["step"]) for line in lines] == [(1, 1), (2, 2)]


def test_a_full_disk_stops_nothing_and_what_it_refused_is_written_later(tmp_path: Path) -> None:
    run = Run(Folder.at(tmp_path / "run").make())
    seen: list[dict[str, Any]] = []
    tracker = Tracker(run, seen.append)
    tracker.write(record(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))  # every write fails
    try:
        for step in range(2, 40):  # more than any queue holds
            tracker.write(record(step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert [one["message"] for one in seen if "message" in one] == [
        f"{tmp_path / 'run'} cannot be written to (File too large); make room there. Training goes on."
    ]
    tracker.write(record(40))
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))


def test_a_full_disk_is_one_sentence() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/runs/x/status.json")
    around = RuntimeError("a task failed")
    around.__cause__ = full
    assert str(full_disk(around)).startswith("no room is left on the disk for /runs/x/status.json; make room and give the same")
    assert full_disk(OSError(errno.EACCES, "Permission denied")) is None
