"""The end of a training that leaves nothing to export, and one that Ctrl-C ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from apprentice.errors import TrainingError
from apprentice.run.fence import lease_run
from apprentice.run.folder import Run
from apprentice.storage import Folder
from apprentice.train.checkpoint import format as checkpoints
from apprentice.train.distributed.compat import PolicyTrainer
from apprentice.train.distributed.driver import _finish
from apprentice.train.state import Goal
from tests.train.checkpoint.test_format import saved


def finish(run: Run) -> None:
    nothing: Any = None  # what comes after is not reached
    with lease_run(run.folder, "train") as lease:
        _finish(nothing, run, nothing, Goal(4), nothing, lease.token, 1)


def test_no_checkpoint_that_can_be_read_is_no_ctrl_c(tmp_path: Path) -> None:
    run = Run(Folder.at(tmp_path / "run"))
    (saved(run.checkpoints, 4).folder / checkpoints.STATE).write_text("{")
    with pytest.raises(TrainingError, match=r"^training is over, but no checkpoint in .*/run/checkpoints can be read"):
        finish(run)


def test_only_an_earlier_one_that_can_be_read(tmp_path: Path) -> None:
    run = Run(Folder.at(tmp_path / "run"))
    saved(run.checkpoints, 2)
    (saved(run.checkpoints, 4).folder / checkpoints.STATE).write_text("{")
    with pytest.raises(
        TrainingError, match="that can be read is that of step 2; give the same command again: it goes on from there"
    ):
        finish(run)


@pytest.fixture
def handler_put_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("handler_put_back")
def test_the_trainer_knows_of_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train 2.60's private `_register_sigint_handler`: where the controller is gone it leaves with exit code 0."""

    class Controller:
        class abort:  # noqa: N801  as an actor's method looks
            remote = staticmethod(lambda: None)

    def gone(_: Any) -> None:
        raise ray.exceptions.RayActorError

    monkeypatch.setattr(ray, "get", gone)
    trainer = object.__new__(PolicyTrainer)
    trainer._register_sigint_handler(Controller())
    assert not trainer.stopped
    with pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGINT)
    assert trainer.stopped
