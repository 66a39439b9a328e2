"""Our own error is found under whatever Ray puts around it."""

from __future__ import annotations

from apprentice.errors import DataError, RowError, TrainingError, all_causes
from apprentice.train.distributed.failure import find_apprentice_error, is_lost_connection


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
    assert find_apprentice_error(GroupError({0: RuntimeError("peer gone"), 1: WrappedError(ours)})) is ours


def test_the_plain_error_is_preferred() -> None:
    plain = DataError("file gone")
    assert find_apprentice_error(DualError(plain)) is plain
    assert isinstance(find_apprentice_error(DualError(ValueError())), DualError)


def test_raised_from() -> None:
    try:
        try:
            raise RowError("null", "row 3")
        except RowError as row:
            raise ValueError("later") from row
    except ValueError as error:
        error_of_ours = find_apprentice_error(error)
    assert isinstance(error_of_ours, RowError)
    assert error_of_ours.reason == "null"


def test_nothing_of_ours_and_no_endless_walk() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert find_apprentice_error(first) is None
    assert len(list(all_causes(first))) == 2


def test_lost_peer() -> None:
    assert is_lost_connection(RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"))
    assert not is_lost_connection(RuntimeError("size mismatch"))
    assert not is_lost_connection(ValueError("gloo"))


def test_only_the_text_came_through() -> None:
    text = 'ray::MapWorker()\n  File "x.py", line 3\napprentice.errors.DataError: /a/b.parquet is gone.\n\nThe above exception …'
    error_of_ours = find_apprentice_error(RuntimeError(text))
    assert type(error_of_ours) is DataError
    assert str(error_of_ours) == "/a/b.parquet is gone."
    assert find_apprentice_error(RuntimeError("apprentice.errors.NoSuchError: x")) is None
