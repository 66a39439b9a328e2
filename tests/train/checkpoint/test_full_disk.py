"""A disk of its own that is full while a run under Ray saves: the run goes on, says so, and needs only its last checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apprentice.data.stream import make_corpus
from apprentice.errors import StorageError
from apprentice.run.folder import Run, open_run
from apprentice.train.distributed import driver as launch
from tests.conftest import NEEDS_MOUNT
from tests.train.distributed.test_driver import recipe, steps_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
LEFT = 600_000  # bytes: enough for lines and events, too few for a checkpoint


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of a file system of 32 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"{NEEDS_MOUNT} ({made.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """The file that takes all but `LEFT` bytes."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - LEFT))
    return ballast


def waiting(ballast: Path, before: int) -> Callable[[launch.WorkerJob], None]:
    """A worker function that takes the rows of step `before` once `ballast` is gone."""

    def work(job: Any) -> None:
        import time

        from apprentice.train import worker as training_worker
        from apprentice.train.distributed import ray_worker

        inner = training_worker.run_worker

        def run_worker(config: Any, restored: Any, rows: Any, *rest: Any, **more: Any) -> Any:
            def watched() -> Any:
                for step, batch in enumerate(rows, start=1):
                    while step == before and ballast.exists():
                        time.sleep(0.05)
                    yield batch

            return inner(config, restored, watched(), *rest, **more)

        training_worker.run_worker = run_worker
        ray_worker.work(job)

    return work


def trained(run: Run, heard: Callable[[str], None] = lambda message: None) -> tuple[launch.TrainResult | StorageError, list[str]]:
    """What came of training into a disk that is full from the first step on, and what was said of its checkpoints.

    While a checkpoint fills the disk up, the lines of steps.jsonl may find no room either and wait: that is another message.
    """
    made = run.recipe()
    messages: list[str] = []

    def progress(record: dict[str, Any]) -> None:
        if record.get("message", "").startswith("the checkpoint of step"):
            messages.append(record["message"])
            heard(messages[-1])

    try:
        return launch.train(made, run, make_corpus(made, run), progress=progress), messages
    except StorageError as error:
        return error, messages


def test_a_run_goes_on_while_its_disk_is_full(
    disk: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path, tiny_model, storage=str(disk), tuning={"method": "full"})
    run = open_run(made)
    make_corpus(made, run)
    ballast = fill(disk)
    monkeypatch.setattr(launch, "work", waiting(ballast, 5))
    result, messages = trained(run, lambda message: ballast.unlink())
    assert isinstance(result, launch.TrainResult)
    assert (result.steps, result.restarts, len(steps_of(run))) == (8, 0, 8)
    [message] = messages
    assert re.match(r"the checkpoint of step 3 cannot be written to .* \(.*space.*\); there is no other checkpoint\.", message)
    assert {folder.name for folder in run.checkpoints.children() if folder.name.startswith("step-")} == {
        "step-000006.2",
        "step-000008.2",
    }

    other = made.model_copy(update={"name": "other"})
    run = open_run(other)
    make_corpus(other, run)
    fill(disk)
    monkeypatch.undo()
    result, messages = trained(run)
    assert isinstance(result, StorageError)
    assert re.match(
        r"the checkpoint of step 8 cannot .* there is no other checkpoint\. Make room there and train again", str(result)
    )
    assert [re.findall(r"step (\d)", message)[0] for message in messages] == ["3", "6"]
    assert [step["step"] for step in steps_of(run)] == list(range(1, 9))
    assert run.status()["state"] == "failed"
