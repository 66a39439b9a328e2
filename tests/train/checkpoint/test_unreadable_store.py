"""A store that does not answer is no damaged checkpoint: it is asked again, and then the attempt ends. Deleting never ends one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import torch

from apprentice import storage
from apprentice.errors import StorageError
from apprentice.storage import Folder
from apprentice.train.checkpoint import format as checkpoints
from apprentice.train.checkpoint.shard_reader import open_tensors
from apprentice.train.state import State
from tests.support.checkpoints import save
from tests.support.object_store import BUCKET, object_store

DOWN = OSError("When reading information for key 'a' in bucket 'b': AWS Error SLOW_DOWN during GetObject operation: 503")


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, in seconds; none is waited for."""
    pauses: list[float] = []
    monkeypatch.setattr(storage, "pause", pauses.append)
    return pauses


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder.at(tmp_path / "checkpoints")
    for step in (3, 6):
        saved(folder, step)
    return folder


def saved(folder: Folder, step: int, loss: float | None = None, **facts: Any) -> checkpoints.Checkpoint:
    return save(folder, [("weight/a", torch.zeros(1))], State(step=step, validation_loss=loss), facts)


def names(folder: Folder) -> list[str]:
    return [child.name for child in folder.children()]


def failing(monkeypatch: pytest.MonkeyPatch, what: str, times: float) -> None:
    """`Folder`'s method `what` gets no answer `times` times."""
    real: Callable[..., Any] = getattr(Folder, what)
    left = [times]

    def asked(self: Folder) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise DOWN
        return real(self)

    monkeypatch.setattr(Folder, what, asked)


@pytest.mark.parametrize("what", ["read_bytes", "exists", "children"])
def test_it_is_asked_again(what: str, folder: Folder, waited: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, what, 2)
    newest = checkpoints.find_newest(folder)
    assert newest is not None
    assert newest.state.step == 6
    assert waited == [1.0, 2.0]


ASKED = [
    *(
        (ask, what)
        for ask in (checkpoints.find_newest, checkpoints.find_best, checkpoints.find_awaiting_validation)
        for what in ("read_bytes", "children")
    ),
    (checkpoints.find_newest, "exists"),
    (checkpoints.delete_leftovers, "exists"),
    (checkpoints.delete_leftovers, "children"),
]


@pytest.mark.parametrize(("ask", "what"), ASKED)
def test_one_that_stays_away_ends_the_attempt(
    ask: Callable[[Folder], Any], what: str, folder: Folder, waited: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, what, float("inf"))
    with pytest.raises(StorageError, match=r"does not answer \(.*SLOW_DOWN.*503\); nothing of the run is lost"):
        ask(folder)
    assert waited == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_credentials_that_expired(waited: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    with object_store() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        folder = Folder.at(f"s3://{BUCKET}/run/checkpoints")
        saved(folder, 3)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "expired")
        with pytest.raises(StorageError, match=r"does not answer \(.*AWS Error INVALID_ACCESS_KEY_ID"):
            checkpoints.find_newest(folder)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", store.key_id)
        newest = checkpoints.find_newest(folder)
        assert newest is not None
        assert newest.state.step == 3


def test_nothing_is_deleted_while_the_store_cannot_be_read(
    folder: Folder, waited: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    newest = saved(folder, 9)
    failing(monkeypatch, "read_bytes", float("inf"))
    with caplog.at_level(logging.WARNING):
        checkpoints.prune(folder, 1, newest)
    assert "no old checkpoint is deleted now" in caplog.text
    assert names(folder) == ["step-000003", "step-000006", "step-000009"]


def test_damaged_ones_that_were_passed_over_never_push_out_what_came_after(folder: Folder) -> None:
    saved(folder, 9, 0.1)
    (folder / "step-000009" / "tensors-0000-00.safetensors").write_bytes(b"damaged")
    before = checkpoints.find_newest(folder)
    assert before is not None
    assert before.state.step == 6
    checkpoints.prune(folder, 2, saved(folder, 7, 0.5))
    assert names(folder) == ["step-000006", "step-000007"]
    again = checkpoints.find_newest(folder)
    assert again is not None
    assert again.state.step == 7


def test_a_loss_that_is_no_number_never_wins(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "checkpoints")
    for step, loss in enumerate((float("nan"), 0.4, float("inf"), float("-inf"), float("nan")), start=1):
        last = saved(folder, step, loss)
    best = checkpoints.find_best(folder)
    assert best is not None
    assert best.state.step == 2
    checkpoints.prune(folder, 1, last)
    assert names(folder) == ["step-000002", "step-000005"]
    (folder / "step-000002").delete()
    newest = checkpoints.find_best(folder)
    assert newest is not None
    assert newest.state.step == 5


def test_what_somebody_reads_is_not_deleted(folder: Folder) -> None:
    newest = saved(folder, 9)
    oldest = checkpoints.find_named(folder, "step-000003")
    assert oldest is not None
    with open_tensors(oldest) as reader:
        checkpoints.prune(folder, 1, newest)
        assert reader.read("weight/a").tolist() == [0.0]
        assert names(folder) == ["step-000003", "step-000009"]
    checkpoints.prune(folder, 1, newest)
    assert names(folder) == ["step-000009"]
    with checkpoints.mark_in_use(folder / "step-000003"):  # which is gone
        assert checkpoints.find_named(folder, "step-000003") is None
    assert names(folder) == ["step-000009"]


def test_a_reader_that_comes_while_it_is_deleted_reads_on(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    newest, doomed = saved(folder, 9), folder / "step-000003"
    delete = Folder.delete

    with contextlib.ExitStack() as reading:
        checkpoint = checkpoints.find_named(folder, doomed.name)
        assert checkpoint is not None

        def slow(self: Folder) -> None:
            if self == doomed / "checksums.json":
                reading.enter_context(checkpoints.mark_in_use(doomed))
            delete(self)

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "delete", slow)
            checkpoints.prune(folder, 2, newest)
        with open_tensors(checkpoint) as reader:
            assert len(reader.read("weight/a")) == 1
        assert checkpoints.find_named(folder, doomed.name) is None
    checkpoints.delete_leftovers(folder)
    assert names(folder) == ["step-000006", "step-000009"]


def test_marks_of_readers_that_died_go_with_the_next_start(folder: Folder) -> None:
    (folder / "step-000003" / "in-use-1").write_bytes(b"")
    checkpoints.delete_leftovers(folder)
    checkpoints.prune(folder, 1, saved(folder, 9))
    assert names(folder) == ["step-000009"]


def test_what_cannot_be_deleted_stays_and_ends_nothing(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on NFS, where a file that somebody has open keeps its folder from going."""
    newest = saved(folder, 9)

    class Busy(pyarrow.fs.LocalFileSystem):  # type: ignore[misc]
        def delete_dir(self, path: str) -> None:
            raise OSError(39, "Directory not empty", path)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Folder, "filesystem", lambda self: (Busy(), self.uri))
        checkpoints.prune(folder, 1, newest)
        checkpoints.delete_leftovers(folder)
    assert "cannot be deleted now" in caplog.text
    assert names(folder) == ["step-000003", "step-000006", "step-000009"]
    newest = checkpoints.find_newest(folder)
    assert newest is not None
    assert newest.state.step == 9
    checkpoints.delete_leftovers(folder)
    assert names(folder) == ["step-000009"]


@pytest.mark.usefixtures("waited")
def test_a_store_that_stops_to_answer_while_it_deletes_ends_nothing(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    newest, real = saved(folder, 9), Folder.delete

    def deleted(self: Folder) -> None:
        real(self)
        failing(monkeypatch, "children", float("inf"))  # after the checksums of the first one

    monkeypatch.setattr(Folder, "delete", deleted)
    checkpoints.prune(folder, 1, newest)
    monkeypatch.undo()
    assert "step-000009" in names(folder)
    checkpoints.delete_leftovers(folder)
    checkpoints.prune(folder, 1, newest)
    assert names(folder) == ["step-000009"]
