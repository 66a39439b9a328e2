"""Our own error is found under whatever Ray puts around it."""

from __future__ import annotations

from apprentice.errors import DataError, RowError, TrainingError, all_causes
from apprentice.train.distributed.failure import lost_peer, mendable


class WrappedError(Exception):
    def __init__(self, cause: BaseException) -> None:
        super().__init__("layer")
        self.cause = cause


class GroupError(Exception):
    def __init__(self, failures: dict[int, BaseException]) -> None:
        super().__init__("group")
        self.worker_failures = failures


class DualError(WrappedError, DataError):
    """Ray's task errors are at once Ray's and the user's."""


def test_ours_is_found() -> None:
    ours = TrainingError("step 3")
    assert mendable(GroupError({0: RuntimeError("peer gone"), 1: WrappedError(ours)})) is ours


def test_the_plain_error_is_preferred() -> None:
    plain = DataError("file gone")
    assert mendable(DualError(plain)) is plain
    assert isinstance(mendable(DualError(ValueError())), DualError)


def test_raised_from() -> None:
    try:
        try:
            raise RowError("null", "row 3")
        except RowError as row:
            raise ValueError("later") from row
    except ValueError as error:
        found = mendable(error)
    assert isinstance(found, RowError)
    assert found.reason == "null"


def test_nothing_of_ours_and_no_endless_walk() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert mendable(first) is None
    assert len(list(all_causes(first))) == 2


def test_lost_peer() -> None:
    assert lost_peer(RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"))
    assert not lost_peer(RuntimeError("size mismatch"))
    assert not lost_peer(ValueError("gloo"))


def test_only_the_text_came_through() -> None:
    text = 'ray::MapWorker()\n  File "x.py", line 3\napprentice.errors.DataError: /a/b.parquet is gone.\n\nThe above exception …'
    found = mendable(RuntimeError(text))
    assert type(found) is DataError
    assert str(found) == "/a/b.parquet is gone."
    assert mendable(RuntimeError("apprentice.errors.NoSuchError: x")) is None
