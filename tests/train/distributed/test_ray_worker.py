"""What a worker under Ray Train does with running out of memory in a step, with Ray's calls replaced."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apprentice.errors import TrainingError
from apprentice.recipe import load_recipe
from apprentice.run.folder import open_run
from apprentice.train import worker
from apprentice.train.distributed import ray_worker
from apprentice.train.distributed.mailbox import Mailbox
from apprentice.train.distributed.ray_worker import WorkerJob, work
from apprentice.train.state import Goal
from apprentice.train.worker_config import MicroBatchTooLargeError, WorkerConfig
from tests.support.recipes import tiny_recipe
from tests.train.rows import packed_columns


def actor(mailbox: Mailbox) -> Any:
    """The mailbox, called as an actor is."""
    names = [name for name in dir(mailbox) if not name.startswith("_")]
    return SimpleNamespace(**{name: SimpleNamespace(remote=getattr(mailbox, name)) for name in names})


def test_the_next_attempt_has_half_as_many_rows_at_once(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model))
    mailbox = Mailbox(2)
    limits = []

    def run(config: WorkerConfig, *_: Any, **__: Any) -> None:
        limits.append(config.largest_micro_batch)
        if len(limits) < 3:
            raise MicroBatchTooLargeError(8 // len(limits), TrainingError("a worker ran out of memory"))

    monkeypatch.setattr(ray_worker.ray, "get", lambda value: value)
    monkeypatch.setattr(
        ray_worker.ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2)
    )
    monkeypatch.setattr(ray_worker.ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray_worker, "Heartbeat", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(ray_worker, "read_rows", lambda *_: iter([]))
    monkeypatch.setattr(worker, "run_worker", run)
    job = WorkerJob(WorkerConfig(recipe, open_run(recipe), Goal(2), 256), actor(mailbox), None, packed_columns(1), None)  # type: ignore[arg-type]
    for _ in range(2):
        mailbox.begin_attempt(None)
        with pytest.raises(MicroBatchTooLargeError):
            work(job)
    mailbox.begin_attempt(None)
    work(job)
    assert limits == [None, 4, 2]
    assert mailbox.outcome().error is None  # so that another attempt is made
