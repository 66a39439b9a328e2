"""A checkpoint that cannot be written is told and tried again; the run ends with an error only if its last one is missing."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apprentice.errors import StorageError
from apprentice.storage import Folder
from apprentice.train import checkpoint as checkpoints
from apprentice.train.saving import Saver
from apprentice.train.state import State

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


class Ears:
    """What a saver said, and to whom."""

    def __init__(self, folder: Folder, *, first: bool = True) -> None:
        self.told: list[tuple[int, str]] = []
        self.registered: list[tuple[bool, int]] = []
        self.gathered = 0
        self.saver = Saver(
            folder,
            2,
            {"dtype": "float32"},
            first=first,
            tell=lambda state, *, message: self.told.append((state.step, message)),
            register=lambda saved, state: self.registered.append((saved is not None, state.step)),
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in "abc":
            self.gathered += 1
            yield f"weight/{name}", torch.ones(LARGE)

    def save(self, step: int, **more: Any) -> None:
        self.saver.save(State(step=step), self.tensors(), **({"last": False} | more))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.at(tmp_path / "checkpoints")


def names(folder: Folder) -> list[str]:
    return sorted(child.name for child in folder.children())


def test_training_goes_on_and_the_next_one_is_tried(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checkpoints, "SHARD_BYTES", LARGE
    )  # one tensor a file: the first fails, the others are gathered all the same
    ears = Ears(folder)
    ears.save(3)
    with no_room():
        ears.save(6)
    assert ears.gathered == 6
    assert names(folder) == ["step-000003"]  # and no half of one
    ((step, message),) = ears.told
    assert step == 6
    assert message.startswith(f"the checkpoint of step 6 cannot be written to {folder} (")
    assert message.endswith(
        "); the last whole checkpoint is that of step 3. Training goes on, and the next checkpoint is tried as usual."
    )
    ears.save(9, last=True)
    assert names(folder) == ["step-000003", "step-000009"]
    assert ears.registered == [(True, 3), (False, 6), (True, 9)]


def test_the_last_one_must_be_there(folder: Folder) -> None:
    ears = Ears(folder)
    ears.save(3)
    with no_room(), pytest.raises(StorageError, match=r"step 6 cannot .*\); the last whole .* step 3\. Make room there and train"):
        ears.save(6, last=True)
    assert ears.gathered == 6
    assert names(folder) == ["step-000003"]
    found = checkpoints.restorable(folder)
    assert found is not None
    assert found.state.step == 3


def test_without_any_checkpoint(folder: Folder) -> None:
    ears = Ears(folder)
    with no_room(), pytest.raises(StorageError, match=r"; there is no other checkpoint\. Make room"):
        ears.save(2, last=True)


def test_the_other_workers_gather_and_write_nothing(folder: Folder) -> None:
    ears = Ears(folder, first=False)
    ears.save(3)
    assert (ears.gathered, ears.registered, names(folder)) == (3, [(False, 3)], [])
