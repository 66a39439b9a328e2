"""Where a task's rows lie: its declared places to one list of Parquet files, and random access to the rows in them.

Whatever cannot be read at random (JSONL, CSV, built-in tasks) becomes Parquet once, in `convert`. Knows nothing of
which rows are wanted, nor in what order.
"""

from __future__ import annotations

import hashlib
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from apprentice.data.convert import builtin_file, parquet_file
from apprentice.errors import DataError, StorageError, did_you_mean
from apprentice.storage import Folder
from apprentice.tasks.loading import library
from apprentice.tasks.schema import SourceSpec, Task, missing_fields

Split = Literal["train", "test"]
T = TypeVar("T")

RETRY_PAUSES_S = (0.1, 0.5, 2.0)  # between attempts to read what answers with an OSError


@dataclass(frozen=True)
class Source:
    """The rows of one split of one task. Row numbers count through `files` in order."""

    task: str
    split: Split
    files: tuple[str, ...]  # local paths or URIs of Parquet files
    group_rows: tuple[int, ...]  # rows of every row group, over all files in order
    columns: dict[str, str]  # field of the task → column of the files
    fingerprint: str  # of sizes and footers, whatever the folder

    @property
    def rows(self) -> int:
        return sum(self.group_rows)


class _Footer(NamedTuple):
    group_rows: tuple[int, ...]
    columns: tuple[str, ...]
    digest: str


def resolve(task: Task, split: Split, *, root: str | None, cache: Folder) -> Source | None:
    """The Parquet files of one split: from the first of the task's places that can be reached; None if that one declares no such split.

    Both splits come from the same place, so that train and test stay apart. Raises `DataError` if no place can be reached,
    a file is missing or unreadable, or a column is.
    """
    spec = _reachable(task, root)
    name = spec.splits.get(split)
    if name is None or (spec.files is not None and name not in spec.files):
        return None
    files = _files(task, spec, name, split, root, cache)
    with ThreadPoolExecutor(max_workers=8) as pool:
        footers = list(pool.map(_footer, files))
    for file, footer in zip(files, footers, strict=True):
        if missing := missing_fields(task, spec, footer.columns):
            raise DataError(_missing_column(task, spec, file, footer.columns, missing))
    digest = hashlib.sha256("\n".join(footer.digest for footer in footers).encode()).hexdigest()
    groups = tuple(rows for footer in footers for rows in footer.group_rows)
    columns = {field: spec.columns.get(field, field) for field in sorted(task.fields)}
    return Source(task.name, split, tuple(files), groups, columns, digest)


def _reachable(task: Task, root: str | None) -> SourceSpec:
    """The first place that can be reached. A hub is only asked if nothing nearer is there; it answers for itself later."""
    tried = []
    for spec in task.sources:
        if spec.dataset is not None:
            if root is not None and (Folder.at(root) / spec.dataset).exists():
                return spec
            tried.append("data.root is not set" if root is None else f"{root}/{spec.dataset} (data.root) does not exist")
        elif spec.files is not None:
            if any(Folder.at(path).exists() for path in spec.files.values()):
                return spec
            tried.append(f"{next(iter(spec.files.values()))} does not exist")
        else:
            return spec
    first = task.sources[0]
    remedy = f"put the dataset {first.dataset!r} under data.root" if first.dataset is not None else "correct the path in its file"
    raise DataError(f"task {task.name!r}: no source can be reached: {'; '.join(tried)}; {remedy}.")


def _files(task: Task, spec: SourceSpec, name: str, split: Split, root: str | None, cache: Folder) -> list[str]:
    if spec.builtin is not None:
        return [builtin_file(spec.builtin, split, cache)]
    if spec.files is not None:
        return [parquet_file(spec.files[name], cache, task.name)]
    if spec.dataset is not None:
        folder = Folder.at(root or "") / spec.dataset
        found = [child.uri for child in folder.children() if fnmatch(child.name, f"{name}.parquet")]
        found = found or _parquet_in(folder, name)
        if not found:
            raise DataError(f"task {task.name!r}: {folder}/{name}.parquet does not exist; put it there or correct data.root.")
        return found
    return _hub_files(task, spec, name)


def _parquet_in(folder: Folder, name: str) -> list[str]:
    """`<name>-*.parquet` beside others, or `<name>/*.parquet`."""
    beside = [child.uri for child in folder.children() if fnmatch(child.name, f"{name}-*.parquet")]
    return beside or [child.uri for child in (folder / name).children() if child.name.endswith(".parquet")]


def _hub_files(task: Task, spec: SourceSpec, name: str) -> list[str]:
    # The hub keeps a Parquet copy of every dataset in the branch `~parquet`, one folder for each configuration.
    at = Folder(f"hf://datasets/{spec.hub}@{spec.revision or '~parquet'}")
    try:
        for folder in (at / (spec.config or "default"), at / "data", at):
            if found := _parquet_in(folder, name):
                return found
    except (OSError, StorageError, ValueError) as error:
        raise DataError(
            f"task {task.name!r}: dataset {spec.hub!r} cannot be reached on the hub ({error.__class__.__name__});"
            " check the network and HF_TOKEN, or put the dataset under data.root."
        ) from error
    raise DataError(
        f"task {task.name!r}: dataset {spec.hub!r} has no Parquet files for split {name!r}, configuration"
        f" {spec.config or 'default'!r}; correct `splits` or `config` of that source."
    )


def _missing_column(task: Task, spec: SourceSpec, file: str, columns: Sequence[str], missing: Sequence[tuple[str, str]]) -> str:
    place, field = missing[0]
    where = f"template {place!r}" if place != "task" else "an expression"
    home = library().get(task.name)
    column = spec.columns.get(field, field)
    more = f" ({len(missing) - 1} more like this.)" if len(missing) > 1 else ""
    return (
        f"task {task.name!r}{f' ({home})' if home else ''}: {where} names {field!r}, but {file} has no column {column!r}."
        f"{did_you_mean(column, columns)} Its columns are {', '.join(columns)}.{more}"
    )


def _retrying(file: str, action: Callable[[], T]) -> T:
    """The result of `action`, tried again after an `OSError`. Raises `DataError` that names the file."""
    for pause in (*RETRY_PAUSES_S, None):
        try:
            return action()
        except FileNotFoundError as error:
            raise DataError(f"{file} does not exist any more; put it back.") from error
        except OSError as error:
            if pause is None:
                attempts = len(RETRY_PAUSES_S) + 1
                raise DataError(
                    f"{file} cannot be read, tried {attempts} times: {error}; check the file and the network."
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
            found = pq.ParquetFile(stream)
            groups = tuple(found.metadata.row_group(number).num_rows for number in range(found.metadata.num_row_groups))
            return _Footer(groups, tuple(found.schema_arrow.names), digest)

    return _retrying(file, read)


class Reader:
    """Rows of a source by number. Keeps the last `cached_groups` row groups, decoded, only the columns that the task needs."""

    def __init__(self, source: Source, cached_groups: int = 8) -> None:
        self.source = source
        self._cached_groups = cached_groups
        self._ends = np.cumsum(np.array(source.group_rows, dtype=np.int64))
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()
        self._opened: dict[str, pq.ParquetFile] = {}
        self._first_group: list[int] | None = None

    def rows(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Field → value for each row number, in the order asked. Raises `DataError` naming the file that cannot be read."""
        wanted = np.asarray(ids, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.source.rows:
            raise DataError(
                f"task {self.source.task!r} has {self.source.rows} {self.source.split} rows; row {wanted.max()} is none."
            )
        groups = np.searchsorted(self._ends, wanted, side="right")
        found: list[dict[str, Any]] = [{}] * len(wanted)
        for group in np.unique(groups):
            places = np.flatnonzero(groups == group)
            start = int(self._ends[group]) - self.source.group_rows[group]
            rows = self._group(int(group)).take(pa.array(wanted[places] - start)).to_pylist()
            for place, row in zip(places, rows, strict=True):
                found[place] = row
        return found

    def _group(self, number: int) -> pa.Table:
        if number not in self._groups:
            while len(self._groups) >= self._cached_groups:
                self._groups.popitem(last=False)
            self._groups[number] = self._read(number)
        self._groups.move_to_end(number)
        return self._groups[number]

    def _read(self, number: int) -> pa.Table:
        file, inside = self._place(number)
        names: Mapping[str, str] = self.source.columns

        def read() -> pa.Table:
            try:
                table = self._open(file).read_row_group(inside, columns=sorted(set(names.values())))
            except OSError:
                self._opened.pop(file, None)  # a broken connection stays broken
                raise
            return pa.table({field: table[column] for field, column in names.items()}).combine_chunks()

        table = _retrying(file, read)
        if table.num_rows != self.source.group_rows[number]:
            raise DataError(f"{file} has changed since it was indexed; put the old file back or start over with --restart.")
        return table

    def _place(self, number: int) -> tuple[str, int]:
        """File of a row group, and the group's number in it."""
        if len(self.source.files) == 1:
            return self.source.files[0], number
        if self._first_group is None:
            counts = [_retrying(file, lambda file=file: self._open(file)).num_row_groups for file in self.source.files]
            self._first_group = [0, *accumulate(counts)]
        file = bisect_right(self._first_group, number) - 1
        return self.source.files[file], number - self._first_group[file]

    def _open(self, file: str) -> pq.ParquetFile:
        if file not in self._opened:
            fs, path = Folder.at(file).filesystem()
            self._opened[file] = pq.ParquetFile(fs.open_input_file(path))
        return self._opened[file]
