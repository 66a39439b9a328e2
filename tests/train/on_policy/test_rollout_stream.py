"""Whose weights write a round: its checkpoint is waited for while it may come, and not a moment longer."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from apprentice.errors import TrainingError
from apprentice.run.folder import Run
from apprentice.storage import Folder
from apprentice.train.checkpoint import format as checkpoints
from apprentice.train.on_policy import rollout_stream as rollout
from apprentice.train.on_policy.rollout_stream import wait_for_checkpoint
from tests.train.checkpoint.test_format import saved


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Folder.at(tmp_path / "run"))


def test_it_waits_for_the_workers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(run.checkpoints, 2)
    looked = threading.Semaphore(0)
    monkeypatch.setattr(rollout, "WAIT_S", 0.001)
    inner = checkpoints.find_of_step
    monkeypatch.setattr(checkpoints, "find_of_step", lambda *given: (looked.release(), inner(*given))[1])
    found = []
    waiting = threading.Thread(target=lambda: found.append(wait_for_checkpoint(run, 4)))
    waiting.start()
    for _ in range(3):
        assert looked.acquire(timeout=60)
    assert found == []
    saved(run.checkpoints, 4)
    waiting.join(60)
    assert [checkpoint.state.step for checkpoint in found] == [4]


def test_one_that_is_gone_is_an_error(run: Run) -> None:
    saved(run.checkpoints, 5)
    with pytest.raises(TrainingError, match=r"^the replies of the round after step 4 are not all written, .* run 'run' over with"):
        wait_for_checkpoint(run, 4)


def test_one_that_is_damaged_is_an_error(run: Run) -> None:
    damaged = saved(run.checkpoints, 4)
    (damaged.folder / checkpoints.STATE).write_text("{")
    saved(run.checkpoints, 5)
    with pytest.raises(TrainingError, match="is damaged or gone"):
        wait_for_checkpoint(run, 4)
