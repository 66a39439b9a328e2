"""Sources: resolves a task's declared places to one list of Parquet files, and reads rows of these by number.

Files without random access (JSONL, CSV …) and built-in tasks are converted to Parquet once, by `parquet_conversion`.
"""

from __future__ import annotations

import hashlib
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.errors import HfHubHTTPError
from numpy.typing import NDArray

from apprentice.data.sources.column_text import Reading, read, readings_of
from apprentice.data.sources.delimited import suggest_encoding
from apprentice.data.sources.parquet_conversion import builtin_file, is_saved_to_disk, original_digest, parquet_file
from apprentice.errors import DataError, StorageError, did_you_mean
from apprentice.run.identity import FORMAT
from apprentice.storage import Folder
from apprentice.tasks.schema import Task, missing_fields
from apprentice.tasks.source_spec import SourceSpec

Split = Literal["train", "test"]
T = TypeVar("T")

RETRY_PAUSES_S = (0.1, 0.5, 2.0)  # between attempts to read a file that raises `OSError`
OPEN_FILES = 16  # at most, of one reader
# An unreachable hub raises the base class of the hub client's errors, which is not always an `OSError`.
UNREACHED: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
_FAILED: tuple[type[Exception], ...] = (*UNREACHED, StorageError)


class MissingSourceError(DataError):
    """None of a task's declared places exists."""


@dataclass(frozen=True)
class Source:
    """The files with the rows of one split of one task. Row numbers count through `files` in order, from 0."""

    task: str
    split: Split
    files: tuple[str, ...]  # local paths or URIs of Parquet files
    file_groups: tuple[int, ...]  # number of row groups of each file
    group_rows: tuple[int, ...]  # number of rows of each row group, over all files in order
    columns: dict[str, str]  # field of the task → column of the files
    fingerprint: str  # sha256 of sizes and Parquet footers, independent of the folder
    readings: dict[str, Reading] = field(default_factory=dict)  # field → how its values are decoded, if they are
    encoding: str | None = None  # of binary fields
    named: str | None = None  # the file as the task names it, from which `files` may have been converted
    original: str | None = None  # digest of what `files` were converted from; None for Parquet, and in indices of earlier versions

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(self.group_rows)

    def has_rows_of(self, other: Source) -> bool:
        """Whether both are the same rows: by the originals of converted files, by the files themselves otherwise."""
        if self.fingerprint == other.fingerprint:
            return True
        is_same_original = self.original is not None and self.original == other.original
        # Binary values are decoded when they are read, so their encoding is not part of the converted file.
        return is_same_original and (self.readings, self.encoding) == (other.readings, other.encoding)


class _Footer(NamedTuple):
    group_rows: tuple[int, ...]
    columns: tuple[str, ...]
    readings: dict[str, Reading]  # column → how it is read
    digest: str


def resolve(task: Task, split: Split, *, root: str | None, cache: Folder, rules: int = FORMAT) -> Source | None:
    """The Parquet files of one split, from the first of the task's places that exists; None if that place has no such split.

    Both splits come from the same place, so that training and test rows stay apart. `root` is `data.root`; `cache` is the folder
    for converted files; `rules` is the format of the run that reads. Raises `MissingSourceError` if no place exists, and
    `DataError` if a place cannot be reached, a file is missing or unreadable, a column is missing, or a column is binary and the
    task names no encoding.
    """
    try:
        spec, absent = _reachable(task, root)
        name = spec.splits.get(split)
        if name is None or (spec.files is not None and name not in spec.files):
            return None
        files = _files(task, spec, name, root, cache, absent, rules)
    except UNREACHED as error:
        raise DataError(f"task {task.name!r}: its source cannot be reached: {error}; check data.root and the network.") from error
    with ThreadPoolExecutor(max_workers=8) as pool:
        footers = list(pool.map(_footer, files))
    for file, footer in zip(files, footers, strict=True):
        if missing := missing_fields(task, spec, footer.columns):
            raise DataError(_missing_column(task, spec, _as_named(spec, name, file), footer.columns, missing))
    columns = {
        field: column
        for field in sorted(task.fields)
        if (column := spec.columns.get(field, field)) in footers[0].columns or field not in task.optional_fields
    }
    readings = _readings(task, spec, columns, files, footers) if rules >= 2 else {}
    return Source(
        task=task.name,
        split=split,
        files=tuple(files),
        file_groups=tuple(len(footer.group_rows) for footer in footers),
        group_rows=tuple(rows for footer in footers for rows in footer.group_rows),
        columns=columns,
        fingerprint=_fingerprint(footers, readings, spec.encoding),
        readings=readings,
        encoding=spec.encoding,
        named=spec.files[name] if spec.files is not None else None,
        original=_retrying(files[0], lambda: original_digest(files[0], cache)) if len(files) == 1 else None,
    )


def _fingerprint(footers: Sequence[_Footer], readings: Mapping[str, Reading], encoding: str | None) -> str:
    digests = [footer.digest for footer in footers]
    if "bytes" in readings.values():
        digests.append(str(encoding))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def is_unchanged(source: Source) -> bool:
    """Whether the files of `source` still exist and have its fingerprint."""
    try:
        with ThreadPoolExecutor(max_workers=8) as pool:
            return _fingerprint(list(pool.map(_footer, source.files)), source.readings, source.encoding) == source.fingerprint
    except DataError:
        return False


def _readings(
    task: Task, spec: SourceSpec, columns: dict[str, str], files: Sequence[str], footers: Sequence[_Footer]
) -> dict[str, Reading]:
    """Field → how it is decoded; CSV cells become `Cell` only for fields that the task counts with, else they stay strings.

    Raises `DataError` for a binary column of a task that names no encoding.
    """
    readings: dict[str, Reading] = {}
    for file, footer in zip(files, footers, strict=True):
        for name, column in columns.items():
            reading = footer.readings.get(column)
            if reading is None or (reading == "cell" and name not in task.counted_fields):
                continue
            if reading == "bytes" and spec.encoding is None:
                sample = _first_value(file, column)
                raise DataError(
                    f"task {task.name!r}: column {column!r} of {file} holds bytes, not text: {suggest_encoding(sample)}"
                )
            readings[name] = reading
    return readings


def _first_value(file: str, column: str) -> bytes:
    """The first value with non-ASCII bytes in a column's first row group, else its first value."""
    values = [value for value in _open(file).read_row_group(0, columns=[column])[column].to_pylist() if value]
    return next((value for value in values if not value.isascii()), values[0] if values else b"")


def on_the_hub(task: Task, root: str | None) -> str | None:
    """The hub dataset (`id` or `id/config`) from which the rows of `task` would be read; None if they come from elsewhere."""
    try:
        spec, _ = _reachable(task, root)
    except DataError:
        return None
    return spec.hub and (f"{spec.hub}/{spec.config}" if spec.config else spec.hub)


def _reachable(task: Task, root: str | None) -> tuple[SourceSpec, list[str]]:
    """The first of the task's places that exists, and why those before it do not; a hub or built-in place counts as existing."""
    absent: list[str] = []
    for spec in task.sources:
        if spec.dataset is not None:
            if root is not None and (Folder.at(root) / spec.dataset).exists():
                return spec, absent
            absent.append(
                f"dataset {spec.dataset!r} needs data.root, which is not set"
                if root is None
                else f"{root}/{spec.dataset} (dataset {spec.dataset!r} under data.root) does not exist"
            )
        elif spec.files is not None:
            if any(Folder.at(path).exists() for path in spec.files.values()):
                return spec, absent
            absent.append(f"{next(iter(spec.files.values()))} does not exist")
        else:
            return spec, absent
    raise MissingSourceError(f"task {task.name!r}: {'; '.join(absent)}; correct data.root or the paths in the task's file.")


def _files(task: Task, spec: SourceSpec, name: str, root: str | None, cache: Folder, absent: list[str], rules: int) -> list[str]:
    if spec.builtin is not None:
        return [builtin_file(spec.builtin, name, cache)]
    if spec.files is not None:
        return [parquet_file(spec.files[name], cache, task.name, encoding=spec.encoding, rules=rules)]
    if spec.hub is not None:
        return hub_files(task.name, spec, name, absent)
    folder = Folder.at(root or "") / (spec.dataset or "")
    whole = folder / f"{name}.parquet"
    if parquet_files := [whole.uri] if whole.exists() else _parquet_in(folder, name):
        return parquet_files
    if is_saved_to_disk(folder / name):
        return [parquet_file((folder / name).uri, cache, task.name)]
    raise DataError(f"task {task.name!r}: {whole} does not exist; put it there or correct data.root.")


def _parquet_in(folder: Folder, name: str) -> list[str]:
    """`<name>.parquet` or `<name>-*.parquet` in the folder, or `<name>/*.parquet`."""
    beside = [child for child in folder.children() if child.name == f"{name}.parquet" or child.name.startswith(f"{name}-")]
    inside = [] if beside else (folder / name).children()
    return [child.uri for child in (*beside, *inside) if child.name.endswith(".parquet")]


def hub_files(task: str, spec: SourceSpec, name: str, absent: Sequence[str] = ()) -> list[str]:
    """The Parquet files of the split `name` of a dataset on the hub; `absent` says why earlier sources were not taken.

    Raises `DataError` where the hub or the dataset cannot be reached, or it has no such split.
    """
    # The hub keeps a Parquet copy of every dataset in the branch `~parquet`, one folder for each configuration.
    at = Folder(f"hf://datasets/{spec.hub}@{spec.revision or '~parquet'}")
    before = "".join(f"{reason}; " for reason in absent)
    try:
        for folder in (at / (spec.config or "default"), at / "data", at):
            if parquet_files := _parquet_in(folder, name):
                return parquet_files
        is_there = at.exists()
    except _FAILED as error:
        raise DataError(
            f"task {task!r}: {before}dataset {spec.hub!r} cannot be reached on the hub ({error.__class__.__name__});"
            " correct data.root, or check the network and HF_TOKEN."
        ) from error
    if not is_there:
        raise DataError(
            f"task {task!r}: {before}dataset {spec.hub!r} is not on the hub, or it is private; correct its name or"
            " `revision`, or give a token that may read it in HF_TOKEN."
        )
    raise DataError(
        f"task {task!r}: {before}dataset {spec.hub!r} has no Parquet files on the hub for split {name!r} of configuration"
        f" {spec.config or 'default'!r}; correct `splits` or `config` of that source."
    )


def _as_named(spec: SourceSpec, name: str, file: str) -> str:
    """The file as the task names it, from which `file` may have been converted."""
    return spec.files[name] if spec.files is not None else file


def _missing_column(task: Task, spec: SourceSpec, file: str, columns: Sequence[str], missing: Sequence[tuple[str, str]]) -> str:
    place, field = missing[0]
    where = f"template {place!r}" if place != "task" else "an expression"
    home = task.origin
    column = spec.columns.get(field, field)
    more = f" ({len(missing) - 1} more like this.)" if len(missing) > 1 else ""
    return (
        f"task {task.name!r}{f' ({home})' if home else ''}: {where} names {field!r}, but {file} has no column {column!r}."
        f"{did_you_mean(column, columns)} Its columns are {', '.join(columns)}.{more}"
    )


def _retrying(file: str, action: Callable[[], T]) -> T:
    """The result of `action`, retried after errors of the connection. Raises `DataError` with the file's name."""
    for pause in (*RETRY_PAUSES_S, None):
        try:
            return action()
        except FileNotFoundError as error:
            raise DataError(f"{file} does not exist any more; put it back.") from error
        except UNREACHED as error:
            if pause is None:
                attempts = len(RETRY_PAUSES_S) + 1
                message = " ".join(str(error).split()) or type(error).__name__
                raise DataError(
                    f"{file} cannot be read, tried {attempts} times: {message}; check the file and the network."
                ) from error
            time.sleep(pause)
        except (pa.ArrowException, StorageError) as error:
            raise DataError(f"{file} is not a readable Parquet file: {error}") from error
    raise AssertionError("unreachable")


def _footer(file: str) -> _Footer:
    def read() -> _Footer:
        fs, path = Folder.at(file).filesystem()
        with fs.open_input_file(path) as stream:
            size = stream.size()
            stream.seek(max(0, size - 8))
            length = int.from_bytes(stream.read(4), "little")
            stream.seek(max(0, size - 8 - length))
            digest = hashlib.sha256(f"{size}\n".encode() + stream.read(length)).hexdigest()
            stream.seek(0)
            parquet = pq.ParquetFile(stream)
            groups = tuple(parquet.metadata.row_group(number).num_rows for number in range(parquet.metadata.num_row_groups))
            return _Footer(groups, tuple(parquet.schema_arrow.names), readings_of(parquet.schema_arrow), digest)

    return _retrying(file, read)


class Reader:
    """Random access to the rows of a source; caches the last `cached_groups` row groups, with only the task's columns.

    Picklable; a copy opens the files anew.
    """

    def __init__(self, source: Source, cached_groups: int = 8) -> None:
        self.source = source
        self.cached_groups = cached_groups
        self._ends = np.cumsum(np.array(source.group_rows, dtype=np.int64))
        self._first_groups = [0, *accumulate(source.file_groups)]
        self._read_group = lru_cache(maxsize=cached_groups)(self._read_group_anew)
        self._open = lru_cache(maxsize=OPEN_FILES)(_open)

    def __reduce__(self) -> tuple[type[Reader], tuple[Source, int]]:
        return type(self), (self.source, self.cached_groups)

    def rows(self, ids: Sequence[int] | NDArray[np.int64]) -> list[dict[str, Any]]:
        """Field → value for each row number, in the order of `ids`.

        Raises `DataError` with the name of a file that cannot be read or has changed, `ValueError` for a number out of range.
        """
        numbers = np.asarray(ids, dtype=np.int64)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.source.rows:
            raise ValueError(
                f"task {self.source.task!r} has {self.source.rows} {self.source.split} rows; asked for {numbers.max()}"
            )
        groups = np.searchsorted(self._ends, numbers, side="right")
        rows_in_order: list[dict[str, Any]] = [{}] * len(numbers)
        for group in np.unique(groups):
            places = np.flatnonzero(groups == group)
            start = int(self._ends[group]) - self.source.group_rows[group]
            rows = self._read_group(int(group)).take(pa.array(numbers[places] - start)).to_pylist()
            for place, row in zip(places, rows, strict=True):
                rows_in_order[place] = row
        for name, reading in self.source.readings.items():
            for row in rows_in_order:
                row[name] = read(row[name], reading, self.source.encoding)
        return rows_in_order

    def _read_group_anew(self, number: int) -> pa.Table:
        place = bisect_right(self._first_groups, number) - 1
        file, inside = self.source.files[place], number - self._first_groups[place]
        columns = self.source.columns

        def read() -> pa.Table:
            try:
                table = self._open(file).read_row_group(inside, columns=sorted(set(columns.values())))
            except UNREACHED:
                self._open.cache_clear()  # a file object with a broken connection cannot be used again
                raise
            return pa.table({field: table[column] for field, column in columns.items()}).combine_chunks()

        table = _retrying(file, read)
        if table.num_rows != self.source.group_rows[number]:
            raise DataError(f"{file} has changed since it was indexed; put the old file back or start over with --restart.")
        return table


def _open(file: str) -> pq.ParquetFile:
    fs, path = Folder.at(file).filesystem()
    return pq.ParquetFile(fs.open_input_file(path))
