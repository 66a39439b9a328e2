"""Whose weights write a round: its weights are waited for while they may come, and not a moment longer."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from apprentice.errors import TrainingError
from apprentice.recipe import load_recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder
from apprentice.train.checkpoint import format as checkpoints
from apprentice.train.checkpoint.shard_reader import open_tensors
from apprentice.train.checkpoint.shard_writer import save_weights
from apprentice.train.engine.collectives import Collectives
from apprentice.train.on_policy import rollout_stream as rollout
from apprentice.train.on_policy.rollout_stream import wait_for_weights
from apprentice.train.state import State
from tests.support.checkpoints import whole_shards
from tests.support.on_policy import round_recipe
from tests.train.checkpoint.test_format import saved


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Folder.at(tmp_path / "run"))


def test_it_waits_for_the_workers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(run.checkpoints, 2)
    looked = threading.Semaphore(0)
    monkeypatch.setattr(rollout, "WAIT_S", 0.001)
    inner = checkpoints.find_weights
    monkeypatch.setattr(checkpoints, "find_weights", lambda *arguments: (looked.release(), inner(*arguments))[1])
    snapshots = []
    waiting = threading.Thread(target=lambda: snapshots.append(wait_for_weights(run, 4)))
    waiting.start()
    for _ in range(3):
        assert looked.acquire(timeout=60)
    assert snapshots == []
    saved(run.checkpoints, 4)
    waiting.join(60)
    assert [checkpoint.state.step for checkpoint in snapshots] == [4]


def test_one_that_is_gone_is_an_error(run: Run) -> None:
    saved(run.checkpoints, 5)
    with pytest.raises(TrainingError, match=r"^the replies of the round after step 4 are not all written, .* run 'run' over with"):
        wait_for_weights(run, 4)


def test_one_that_is_damaged_is_an_error(run: Run) -> None:
    damaged = saved(run.checkpoints, 4)
    (damaged.folder / checkpoints.STATE).write_text("{")
    saved(run.checkpoints, 5)
    with pytest.raises(TrainingError, match="are damaged or gone"):
        wait_for_weights(run, 4)


def snapshot(run: Run, step: int, earliest: int | None = None) -> None:
    """Weights as the workers write them after a round's last step, in bfloat16."""
    shards = whole_shards([("weight/a", torch.full((2, 3), float(step), dtype=torch.bfloat16))])
    save_weights(run.checkpoints, shards, State(step=step), None, Collectives(), earliest=step if earliest is None else earliest)


def test_stale_replies_need_the_weights_of_the_round_before(run: Run) -> None:
    for step in (4, 8, 12):
        snapshot(run, step, earliest=step - 4)
    snapshot(run, 12, earliest=8)  # of an attempt that went on from an older checkpoint
    assert [child.name for child in run.checkpoints.children()] == ["weights-000008", "weights-000012.2"]
    assert wait_for_weights(run, 8).state.step == 8


@pytest.mark.parametrize(("staleness", "steps"), [(0, [0, 2, 4, 6]), (1, [0, 0, 2, 4])])
def test_rounds_are_written_by_weights_so_many_rounds_old(staleness: int, steps: list[int], run: Run, tmp_path: Path) -> None:
    """Rounds of two steps; the base, for which nothing is read, writes the first of them."""
    readers: list[int] = []
    changes = {"training__grpo__reward": "run:reward", "training__grpo__staleness": staleness}
    recipe = load_recipe(round_recipe(tmp_path, Path("base"), **changes))
    assert recipe.round.steps == 2

    class Writer:
        def rows(self, window: int, part: int, read: Any) -> dict[str, Any]:
            readers.append(0 if read is None else int(read("weight/a")[0, 0]))
            return {"window": np.array([window])}

    actor = object.__new__(rollout._RoundActor)
    actor._run, actor._writer = run, Writer()
    actor._corpus = SimpleNamespace(recipe=recipe)
    for step in (2, 4, 6):
        snapshot(run, step, earliest=0)
    for window in range(4):
        actor._made(window, 0)
    assert readers == steps


def test_a_round_needs_the_weights_alone(run: Run) -> None:
    """The newest snapshot is enough: once it is there, the rows of all earlier rounds are. Checkpoints come and go as they like."""
    snapshot(run, 4)
    checkpoints.prune(run.checkpoints, 1, saved(run.checkpoints, 3))
    with open_tensors(wait_for_weights(run, 4)) as reader:
        assert set(reader.shapes) == {"weight/a"}
        assert torch.equal(reader.read("weight/a"), torch.full((2, 3), 4.0, dtype=torch.bfloat16))
        snapshot(run, 8)
        assert checkpoints.find_weights(run.checkpoints, 4) is not None  # while somebody reads it
    snapshot(run, 12)
    assert [child.name for child in run.checkpoints.children()] == ["step-000003", "weights-000012"]
    assert wait_for_weights(run, 12).state.step == 12
    newest = checkpoints.find_newest(run.checkpoints)
    assert newest is not None
    assert newest.state.step == 3  # a run never goes on from weights alone
    with pytest.raises(TrainingError, match="are damaged or gone"):
        wait_for_weights(run, 8)
    (run.checkpoints / "weights-000020" / "index.json").write_text("{}")  # whose writer was killed
    checkpoints.delete_leftovers(run.checkpoints)
    assert [child.name for child in run.checkpoints.children()] == ["step-000003", "weights-000012"]
