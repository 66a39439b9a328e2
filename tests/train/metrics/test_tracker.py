"""What the driver writes of a run's records."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path
from typing import Any

import pytest
from ray.train.v2.api.exceptions import ControllerError

from apprentice import pipeline
from apprentice.errors import full_disk_sentence
from apprentice.run.folder import Run
from apprentice.run.json_lines import read_records
from apprentice.storage import Folder
from apprentice.train.metrics.tracker import Tracker


def record(step: int, attempt: int = 1, **more: Any) -> dict[str, Any]:
    figures = {"loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0, "tokens": 100, "seconds": 2.0, "data_wait_s": 0.5}
    return {
        "attempt": attempt,
        "step": step,
        "steps": 4,
        "tokens_per_s": 50.0,
        "data_wait": 0.25,
        "workers": 2,
        "examples": [step],
        **figures,
        **more,
    }


def test_tracker(tmp_path: Path) -> None:
    run = Run(Folder.at(tmp_path / "run").make())
    records: list[dict[str, Any]] = []
    tracker = Tracker(run, records.append)
    for step_record in (record(1), record(2), record(2, attempt=2), record(3, attempt=2)):
        tracker.write(step_record)
    tracker.write({"attempt": 2, "step": 4, "steps": 4, "validation_loss": 1.5})
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [(line["attempt"], line["step"]) for line in lines] == [(1, 1), (1, 2), (2, 2), (2, 3), (2, 4)]
    assert lines[3]["examples"] == [3]
    assert [("examples" in one) for one in records] == [False] * 5
    assert (tracker.tokens, tracker.seconds, tracker.waited) == (200, 4.0, 1.0)  # the first step of each attempt warms up
    assert run.status()["validation_loss"] == 1.5
    assert run.status()["state"] == "training"
    assert len(list((tmp_path / "run" / "events").iterdir())) == 1


def test_smoothed_loss_and_speed_of_one_worker(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    tracker = Tracker(Run(Folder.at(tmp_path / "run").make()), records.append)
    for step, loss in ((1, 4.0), (2, 2.0), (3, float("nan"))):
        tracker.write(record(step, loss=loss))
    tracker.close()
    assert [one["smoothed_loss"] for one in records] == pytest.approx([4.0, (0.9 * 4.0 + 2.0) / 1.9, (0.9 * 4.0 + 2.0) / 1.9])
    assert {one["tokens_per_s_worker"] for one in records} == {25.0}


def test_replies_are_kept_shown_and_drawn(tmp_path: Path) -> None:
    run = Run(Folder.at(tmp_path / "run").make())
    records: list[dict[str, Any]] = []
    tracker = Tracker(run, records.append)
    samples = [{"instruction": "Name a bird.", "reply": "a kite"}]
    tracker.write({"attempt": 1, "step": 2, "steps": 4, "samples": samples})
    tracker.close()
    assert records == [{"attempt": 1, "step": 2, "steps": 4, "samples": samples}]
    assert json.loads((tmp_path / "run" / "steps.jsonl").read_text())["samples"] == samples
    [events] = (tmp_path / "run" / "events").iterdir()
    assert b"a kite" in events.read_bytes()


def test_a_second_tracker_goes_on_in_the_same_file(tmp_path: Path) -> None:
    run = Run(Folder.at(tmp_path / "run").make())
    for step in (1, 2):
        tracker = Tracker(run, lambda _: None)
        tracker.write(record(step))
        tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [(line["attempt"], line["step"]) for line in lines] == [(1, 1), (2, 2)]


@pytest.mark.parametrize("torn", [b'{"attempt": 1, "st', b"\0" * 40, b'{"step": \xc3', b'\0\0\n{"attempt"'])
def test_a_torn_last_line_is_cut_and_told(tmp_path: Path, torn: bytes) -> None:
    """As a kill or a loss of power leaves it."""
    run = Run(Folder.at(tmp_path / "run").make())
    file = tmp_path / "run" / "steps.jsonl"
    file.write_bytes(json.dumps(record(1)).encode() + b"\n" + torn)
    records: list[dict[str, Any]] = []
    tracker = Tracker(run, records.append)
    assert [one["message"] for one in records] == [
        f"{file} ended in {len(torn)} bytes of a line that was never finished; they are cut off"
    ]
    tracker.write(record(2))
    tracker.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["attempt"], line["step"]) for line in lines] == [(1, 1), (2, 2)]


def test_a_last_line_without_its_end_of_line_is_whole(tmp_path: Path) -> None:
    run = Run(Folder.at(tmp_path / "run").make())
    (tmp_path / "run" / "steps.jsonl").write_text(json.dumps(record(1)))
    records: list[dict[str, Any]] = []
    tracker = Tracker(run, records.append)
    tracker.write(record(2))
    tracker.close()
    assert [one["step"] for one in read_records(run.folder / "steps.jsonl")] == [1, 2]
    assert [one for one in records if "message" in one] == []


def test_a_validation_that_comes_late_is_not_the_runs(tmp_path: Path) -> None:
    """Not after a resume either, when the older checkpoint's comes to another process."""
    run = Run(Folder.at(tmp_path / "run").make())
    for step, figures in ((3, {"validation_loss": 1.5, "held_out": 0.4}), (2, {"validation_loss": 1.2, "held_out": 0.1})):
        tracker = Tracker(run, lambda _: None)
        tracker.write(record(step))  # and the status is not written for every step
        tracker.write({"attempt": 1, "step": step, "steps": 4, **figures})
        tracker.close()
    assert (run.status()["validation_loss"], run.status()["held_out"]) == (1.5, 0.4)


def test_the_list_of_runs_has_the_validation_loss_of_what_was_exported(tmp_path: Path) -> None:
    run = Run(Folder.at(tmp_path / "run").make())
    (run.folder / "identity.json").write_json({})
    run.update_status(validation_loss=1.5)
    assert pipeline.list_runs(str(tmp_path))[0]["validation_loss"] == 1.5
    run.update_status(state="trained", validation_loss=1.7, training={"validation_loss": 1.2})  # as earlier versions left it
    assert pipeline.list_runs(str(tmp_path))[0]["validation_loss"] == 1.2


def test_who_has_lost_the_run_writes_nothing_to_it(tmp_path: Path) -> None:
    run = Run(Folder.at(tmp_path / "run").make())
    records: list[dict[str, Any]] = []
    has_lease = True
    tracker = Tracker(run, records.append, (), lambda: has_lease)
    tracker.write(record(1))
    has_lease = False
    tracker.write(record(4))
    tracker.write({"attempt": 1, "step": 4, "steps": 4, "validation_loss": 1.5})
    tracker.close()
    assert [one["step"] for one in records] == [1, 4, 4]
    assert [one["step"] for one in read_records(run.folder / "steps.jsonl")] == [1]
    assert (run.status()["step"], "validation_loss" in run.status()) == (1, False)


def test_a_full_disk_stops_nothing_and_what_it_refused_is_written_later(tmp_path: Path) -> None:
    run = Run(Folder.at(tmp_path / "run").make())
    records: list[dict[str, Any]] = []
    tracker = Tracker(run, records.append)
    tracker.write(record(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))  # every write fails
    try:
        for step in range(2, 40):  # more than any queue holds
            tracker.write(record(step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert [one["message"] for one in records if "message" in one] == [
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
    assert str(full_disk_sentence(around)).startswith(
        "no room is left on the disk for /runs/x/status.json; make room and give the same"
    )
    assert (
        full_disk_sentence(ControllerError(OSError(errno.ENOSPC, "Error writing bytes to file"))) is not None
    )  # Ray Train's own files
    assert full_disk_sentence(OSError(errno.EACCES, "Permission denied")) is None
