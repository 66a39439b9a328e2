"""A checkpoint that cannot be written is told and tried again; the run ends with an error only if its last one is missing."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from apprentice.errors import StorageError
from apprentice.storage import Folder
from apprentice.train.checkpoint import async_saver as saving
from apprentice.train.checkpoint import format as checkpoints
from apprentice.train.checkpoint.async_saver import AsyncSaver
from apprentice.train.checkpoint.shard import Shard
from apprentice.train.checkpoint.shard_reader import open_tensors
from apprentice.train.engine.collectives import Collectives
from apprentice.train.state import State
from tests.support.process_group import join_group

LARGE = 100_000  # numbers of each tensor: 400 kB


@contextmanager
def no_room() -> Iterator[None]:
    """Files may not grow beyond 100 kB, so that writing really fails half-way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class SaverListener:
    """What a saver said, and to whom."""

    def __init__(self, folder: Folder, rank: int = 0) -> None:
        self.rank = rank
        self.messages: list[tuple[int, str]] = []
        self.durations: list[dict[str, float]] = []
        self.registered: list[tuple[bool, int]] = []
        self.saver = AsyncSaver(
            folder,
            2,
            {"dtype": "float32"},
            collectives=Collectives(),
            report=self.report,
            register=lambda saved, state: self.registered.append((saved is not None, state.step)),
        )

    def report(self, state: State, message: str = "", **seconds: float) -> None:
        self.messages.append((state.step, message)) if message else self.durations.append(seconds)

    def shards(self) -> list[Shard]:
        """The first worker's half of each tensor, and of the second the other."""

        def read() -> Tensor:
            return torch.full((LARGE,), 1.0 + self.rank)

        shape = (Collectives().workers, LARGE)
        return [Shard(f"weight/{name}", shape, self.rank * LARGE, LARGE, read) for name in "abc"]

    def settle(self) -> None:
        """Waits for the thread."""
        pending = self.saver._pending
        assert pending is not None
        pending[1].result()

    def save(self, step: int, **more: Any) -> None:
        self.saver.save(State(step=step), self.shards(), **({"last": False} | more))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.at(tmp_path / "checkpoints")


def names(folder: Folder) -> list[str]:
    return sorted(child.name for child in folder.children())


@pytest.mark.parametrize("free", [2**40, 0])  # a copy fits into memory, or not
def test_training_goes_on_and_the_next_one_is_tried(free: int, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "free_memory", lambda: float(free))
    listener = SaverListener(folder)
    listener.save(3)
    listener.settle()
    assert listener.registered == []  # what became of it is known to all workers when they ask, or at the next one
    assert listener.saver.has_saved()
    assert listener.saver.settle() is None
    assert listener.registered == [(True, 3)]
    assert not listener.saver.has_saved()
    with no_room():
        listener.save(6)
        listener.settle()
    assert names(folder) == ["step-000003"]  # and no half of one
    ((step, message),) = listener.messages
    assert step == 6
    assert message.startswith(f"the checkpoint of step 6 cannot be written to {folder} (")
    assert message.endswith(
        "); the last whole checkpoint is that of step 3. Training goes on, and the next checkpoint is tried as usual."
    )
    listener.save(9, last=True)
    assert names(folder) == ["step-000003", "step-000009"]
    assert listener.registered == [(True, 3), (False, 6), (True, 9)]
    assert len(listener.durations) == 2
    assert all(0 < durations["blocked_s"] <= durations["saved_s"] for durations in listener.durations)
    assert [durations["blocked_s"] == durations["saved_s"] for durations in listener.durations] == [free == 0, free == 0]


def test_the_last_one_must_be_there(folder: Folder) -> None:
    listener = SaverListener(folder)
    listener.save(3)
    listener.settle()
    with no_room(), pytest.raises(StorageError, match=r"step 6 cannot .*\); the last whole .* step 3\. Make room there and train"):
        listener.save(6, last=True)
    assert names(folder) == ["step-000003"]
    newest = checkpoints.find_newest(folder)
    assert newest is not None
    assert newest.state.step == 3


def test_without_any_checkpoint(folder: Folder) -> None:
    listener = SaverListener(folder)
    with no_room(), pytest.raises(StorageError, match=r"; there is no other checkpoint\. Make room"):
        listener.save(2, last=True)


def second(rank: int, folder: str) -> None:
    """One of two workers, whose first has no room once and no memory for copies the next time."""
    join_group(folder, rank, 2)
    listener = SaverListener(Folder.at(Path(folder) / "checkpoints"), rank)
    with no_room():
        listener.save(3)
        listener.settle()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "free_memory", lambda: 2.0**40 * rank)  # what one of them lacks keeps both from copying
        listener.save(6, last=True)
    assert listener.registered == [(False, 3), (rank == 0, 6)]
    assert [step for step, _ in listener.messages] == [3] * (rank == 0)
    assert [durations["blocked_s"] == durations["saved_s"] for durations in listener.durations] == [True] * (rank == 0)
    torch.distributed.destroy_process_group()


def test_each_worker_writes_its_part(tmp_path: Path, folder: Folder) -> None:
    torch.multiprocessing.spawn(second, (str(tmp_path),), nprocs=2)
    newest = checkpoints.find_newest(folder)
    assert newest is not None
    assert newest.state.step == 6
    with open_tensors(newest) as reader:
        for name in "abc":
            assert torch.equal(reader.read(f"weight/{name}"), torch.tensor([[1.0], [2.0]]).expand(2, LARGE))


def test_training_goes_on_while_one_is_written(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state and the tensors are those of the step that was saved, whatever came after."""
    may_write = threading.Event()
    write = saving.write_checkpoint

    def slow(*arguments: Any, **more: Any) -> Any:
        assert may_write.wait(30)
        return write(*arguments, **more)

    monkeypatch.setattr(saving, "write_checkpoint", slow)
    listener = SaverListener(folder)
    state, weight = State(step=3, tokens=30), torch.ones(4)
    listener.saver.save(state, [Shard("weight/a", (2, 2), 0, 4, lambda: weight)], last=False)
    state.step, state.tokens = 4, 40
    state.ledger.examples[0] = 1
    weight.zero_()
    assert names(folder) == []
    may_write.set()
    listener.saver.close()
    newest = checkpoints.find_newest(folder)
    assert newest is not None
    assert (newest.state.step, newest.state.tokens, newest.state.ledger.examples) == (3, 30, {})
    with open_tensors(newest) as reader:
        assert reader.read("weight/a").tolist() == [[1, 1], [1, 1]]
