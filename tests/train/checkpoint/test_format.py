"""Checkpoints are whole or absent, and the newest whole one is found."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from apprentice.errors import StorageError
from apprentice.run import fence
from apprentice.run.fence import FencedError, FenceToken, Holder
from apprentice.storage import Folder
from apprentice.train.checkpoint import format as checkpoints
from apprentice.train.checkpoint.shard import Shard
from apprentice.train.checkpoint.shard_reader import open_tensors
from apprentice.train.checkpoint.shard_writer import save_weights, write_checkpoint
from apprentice.train.engine.collectives import Collectives
from apprentice.train.lane_position import LanePosition
from apprentice.train.state import State
from tests.support.checkpoints import save, whole_shards


def saved(folder: Folder, step: int, validation_loss: float | None = None) -> checkpoints.Checkpoint:
    tensors = [("weight/a", torch.full((2, 3), float(step))), ("exp_avg/a", torch.zeros(2, 3))]
    return save(
        folder, tensors, State(step=step, lanes=(LanePosition(row=step),), validation_loss=validation_loss), {"dtype": "float32"}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.at(tmp_path / "checkpoints")


def steps(folder: Folder) -> list[str]:
    return [child.name for child in folder.children()]


def test_round_trip(folder: Folder) -> None:
    assert checkpoints.find_newest(folder) is None
    saved(folder, 3)
    saved(folder, 12, 0.5)
    newest = checkpoints.find_newest(folder)
    assert newest is not None
    assert (newest.folder.name, newest.state, newest.facts) == (
        "step-000012",
        State(step=12, lanes=(LanePosition(row=12),), validation_loss=0.5),
        {"dtype": "float32"},
    )
    with open_tensors(newest) as reader:
        assert torch.equal(reader.read("weight/a"), torch.full((2, 3), 12.0))
        assert torch.equal(reader.read("exp_avg/a"), torch.zeros(2, 3))


@pytest.mark.parametrize("damage", ["file", "sums", "state"])
def test_the_damaged_newest_is_passed_over(folder: Folder, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    saved(folder, 3)
    newest = saved(folder, 6).folder.local
    match damage:
        case "file":
            (newest / "tensors-0000-00.safetensors").unlink()
        case "sums":
            (newest / "checksums.json").write_text("{")
        case "state":
            (newest / "state.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        newest = checkpoints.find_newest(folder)
    assert newest is not None
    assert newest.state.step == 3
    assert len(caplog.records) == 1
    assert "step-000006 is damaged" in caplog.text


def test_a_step_saved_again_is_the_newer(folder: Folder) -> None:
    saved(folder, 6)
    again = saved(folder, 6)
    assert again.folder.name == "step-000006.2"
    newest = checkpoints.find_newest(folder)
    assert newest is not None
    assert newest.folder == again.folder


def test_an_interrupted_save_leaves_nothing_that_counts(folder: Folder) -> None:
    def broken() -> torch.Tensor:
        raise OSError("disk full")

    shards = [Shard("weight/a", (2,), 0, 2, lambda: torch.zeros(2)), Shard("weight/b", (2,), 0, 2, broken)]
    with pytest.raises(StorageError, match=r"the checkpoint of step 2 cannot be written to .* \(disk full\)"):
        write_checkpoint(folder, shards, State(step=2), {})
    assert steps(folder) == []
    (folder / ".part-x" / "state.json").write_text("{}")
    (folder / "step-000009" / "state.json").write_text("{}")  # an upload that never got its checksums
    saved(folder, 1)
    checkpoints.delete_leftovers(folder)
    assert steps(folder) == ["step-000001"]


def test_best_and_prune(folder: Folder) -> None:
    for step, loss in ((1, 0.9), (2, 0.4), (3, 0.7), (4, 0.6)):
        last = saved(folder, step, loss)
    best = checkpoints.find_best(folder)
    assert best is not None
    assert best.state.step == 2
    checkpoints.prune(folder, 3, last)
    assert steps(folder) == ["step-000002", "step-000003", "step-000004"]
    checkpoints.prune(folder, 1, last)
    assert steps(folder) == ["step-000002", "step-000004"]  # the newest to go on from, the best to export


def test_a_damaged_one_takes_no_place_of_those_that_are_kept(folder: Folder) -> None:
    best, damaged = saved(folder, 1, 0.5), saved(folder, 2, 0.3)
    saved(folder, 3, 0.7)
    checkpoints.mark_damaged(damaged.folder, "some bytes changed")
    newest = saved(folder, 4, 0.6)
    checkpoints.prune(folder, 1, newest)
    assert steps(folder) == ["step-000001", "step-000004"]
    assert checkpoints.find_best(folder) == best


def test_what_began_the_round_is_kept_until_the_next_one(folder: Folder) -> None:
    for step in range(1, 8):
        checkpoints.prune(folder, 1, saved(folder, step), rounds=checkpoints.KeptRounds(4, 1))
        assert steps(folder) == sorted({f"step-{step:06d}", *(["step-000004"] if step >= 4 else [])})
        assert checkpoints.find_newest_step(folder) == step
    checkpoints.prune(folder, 1, saved(folder, 8), rounds=checkpoints.KeptRounds(4, 1))
    assert steps(folder) == ["step-000008"]


def test_of_replies_that_may_be_stale_the_weights_of_two_rounds_are_kept(folder: Folder) -> None:
    for step in range(1, 8):
        checkpoints.prune(folder, 1, saved(folder, step), rounds=checkpoints.KeptRounds(2, 2))
        begins = {step // 2 * 2, step // 2 * 2 - 2} - {0, -2}
        assert steps(folder) == sorted(f"step-{number:06d}" for number in {step, *begins})


def test_without_validation_the_newest_is_best(folder: Folder) -> None:
    for step in (1, 2, 3):
        last = saved(folder, step)
    best = checkpoints.find_best(folder)
    assert best is not None
    assert best.state.step == 3
    checkpoints.prune(folder, 1, last)
    assert steps(folder) == ["step-000003"]


def taken(run: Folder, pid: int) -> FenceToken:
    """The right of the first workers of an attempt on another machine."""
    holder = Holder("train", "node-b", pid, "another machine", "1", None, "2026-11-30 10:00:00 UTC")
    clock = iter(range(0, 10_000, 100))
    entry = fence._take(fence.FenceLog(run), holder, lambda _: None, lambda: float(next(clock)), lambda _: None)
    return FenceToken(run, entry.number).start_group(1)


def test_what_an_attempt_saves_lies_under_its_token_and_counts_while_the_run_is_its_own(tmp_path: Path, folder: Folder) -> None:
    run, tensors = Folder.at(tmp_path), [("weight/a", torch.zeros(1))]
    saved(folder, 3)  # by an earlier version
    first = taken(run, 1)
    save(folder, tensors, State(step=6), {}, first)
    assert steps(folder) == ["step-000003", "step-000006.3"]
    second = taken(run, 2)
    with pytest.raises(FencedError, match=r"taken over by `train` \(process 2 on node-b\)"):
        save(folder, tensors, State(step=9), {}, first)
    newest = checkpoints.find_newest(folder)
    assert newest is not None
    assert newest.folder.name == "step-000006.3"
    assert checkpoints.find_of_step(folder, 9) is None
    checkpoints.delete_leftovers(folder)  # as the second does when it begins
    assert steps(folder) == ["step-000003", "step-000006.3"]
    newest = save(folder, tensors, State(step=9), {}, second)
    assert (newest.folder.name, checkpoints.find_newest(folder)) == ("step-000009.6", newest)
    checkpoints.prune(folder, 1, newest)
    assert steps(folder) == ["step-000009.6"]


def test_a_damaged_one_that_is_passed_over_is_saved_again_under_the_next_token(tmp_path: Path, folder: Folder) -> None:
    run, tensors = Folder.at(tmp_path), [("weight/a", torch.zeros(1))]
    first = save(folder, tensors, State(step=6), {}, taken(run, 1))
    (first.folder / "state.json").write_text("{")
    again = save(folder, tensors, State(step=6), {}, taken(run, 2))
    assert [first.folder.name, again.folder.name] == ["step-000006.2", "step-000006.5"]
    assert checkpoints.find_newest(folder) == again


def test_what_another_thread_commits_meanwhile_stays_committed(
    tmp_path: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saver's thread commits a checkpoint while the training thread commits the weights for a round's replies."""
    token, tensors, add = taken(Folder.at(tmp_path), 1), [("weight/a", torch.zeros(1))], fence.FenceLog.add
    earlier = save(folder, tensors, State(step=4), {}, token)
    checkpoints.remove(earlier.folder)

    def late(self: fence.FenceLog, entry: fence.FenceEntry) -> bool:
        monkeypatch.setattr(fence.FenceLog, "add", add)
        save_weights(folder, whole_shards(tensors), State(step=8), token, Collectives(), earliest=8)
        return add(self, entry)

    monkeypatch.setattr(fence.FenceLog, "add", late)
    save(folder, tensors, State(step=8), {}, token)
    assert fence.committed_checkpoints(Folder.at(tmp_path)) == {"step-000008.2", "weights-000008.2"}


def waiting(folder: Folder, step: int) -> checkpoints.Checkpoint:
    return save(
        folder, [("weight/a", torch.zeros(1))], State(step=step), {"dtype": "float32", checkpoints.VALIDATION_AWAITED: True}
    )


def test_a_validation_that_comes_later_counts_as_if_it_had_been_there(folder: Folder) -> None:
    first, second = waiting(folder, 1), waiting(folder, 2)
    assert [checkpoint.state.step for checkpoint in checkpoints.find_awaiting_validation(folder)] == [1, 2]
    checkpoints.record_validation(first, 0.5)
    checkpoints.record_validation(second, 0.7)
    assert checkpoints.find_awaiting_validation(folder) == []
    best, newest = checkpoints.find_best(folder), checkpoints.find_named(folder, "step-000002")
    assert best is not None
    assert newest is not None
    assert (best.state.step, best.state.validation_loss, newest.state.validation_loss) == (1, 0.5, 0.7)


def test_what_waits_for_its_validation_is_spared_within_bounds(folder: Folder) -> None:
    for step in range(1, 7):
        last = waiting(folder, step)
        checkpoints.prune(folder, 1, last)
    assert [checkpoint.state.step for checkpoint in checkpoints.find_awaiting_validation(folder)] == [4, 5, 6]
    assert checkpoints.find_named(folder, "step-000001") is None
    for number, checkpoint in enumerate(checkpoints.find_awaiting_validation(folder)):
        checkpoints.record_validation(checkpoint, None if number == 1 else 1.0 + number)
    checkpoints.prune(folder, 1, last)
    assert steps(folder) == ["step-000004", "step-000006"]
