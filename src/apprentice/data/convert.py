"""Files that cannot be read at random, and the built-in tasks, to Parquet in the cache: once, streaming, whole or absent.

A converted file is named by what it came from (path, size, time of change), so that a changed original is converted anew.
Several processes may convert the same file at once: each writes its own and the last rename wins, with the same bytes.
Knows nothing of tasks' fields.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from apprentice.errors import DataError
from apprentice.storage import Folder
from apprentice.tasks import builtin

ROWS_PER_GROUP = 4096  # a window reads whole row groups, so they are kept small
_BLOCK_BYTES = 16 * 2**20  # of a CSV file; column types are inferred from the first block
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = {".jsonl", ".ndjson"}
_JSON_DOCUMENT = ".json"  # one list of objects, or a task file of Super-NaturalInstructions
_READ_CHARACTERS = 2**20  # of a JSON document at a time
_COMPRESSIONS = {".gz", ".bz2", ".zst", ".lz4"}


def parquet_file(path: str, cache: Folder, task: str) -> str:
    """`path` itself if it is Parquet, or the Parquet file under `cache` that it was converted to.

    Raises `DataError` naming the file: missing, of no known kind, or broken (with the line where that is known).
    """
    file = Folder.at(path)
    fs, inside = file.filesystem()
    info = fs.get_file_info(inside)
    if info.type != pafs.FileType.File:
        raise DataError(f"task {task!r}: {file} does not exist; correct `files` in the task's file.")
    kind = _kind(file.name)
    if kind == ".parquet":
        return file.uri
    if kind not in (*_DELIMITERS, *_JSON_LINES, _JSON_DOCUMENT):
        raise DataError(
            f"task {task!r}: {file} is of no kind that can be read; give Parquet (.parquet), JSON (.jsonl, .ndjson, .json),"
            " .csv or .tsv, all but the first also compressed (.gz, .bz2, .zst)."
        )
    key = hashlib.sha256(f"{file.uri}\n{info.size}\n{info.mtime_ns}\n{ROWS_PER_GROUP}".encode()).hexdigest()[:16]
    target = cache / "converted" / f"{file.name}-{key}.parquet"
    if not target.exists():
        tables = _csv_tables(file, _DELIMITERS[kind]) if kind in _DELIMITERS else _json_tables(file)
        _write(tables, target, file)
    return target.uri


def builtin_file(name: str, split: str, cache: Folder) -> str:
    """The Parquet file under `cache` with the rows of the built-in generator `name`."""
    target = cache / "builtin" / f"{name}-v{builtin.VERSION}-{split}.parquet"
    if not target.exists():
        rows = builtin.rows(name, cast(Literal["train", "test"], split))
        _write(iter([pa.Table.from_pylist(rows)]), target, target)
    return target.uri


def _kind(name: str) -> str:
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in _COMPRESSIONS else path.suffix


def _write(tables: Iterator[pa.Table], target: Folder, origin: Folder) -> None:
    """Writes beside the target under another name and renames; for object stores, to a local file that is then sent whole."""
    here = target.local.parent if target.is_local else Path(tempfile.gettempdir())
    here.mkdir(parents=True, exist_ok=True)
    part = here / f".{uuid.uuid4().hex}.part"
    try:
        first = next(tables, None)
        if first is None or not first.num_columns:
            raise DataError(f"{origin} holds no rows; fill it, or correct `files` in the task's file.")
        with pq.ParquetWriter(part, first.schema, compression="zstd") as writer:
            for table in chain([first], tables):
                writer.write_table(table, ROWS_PER_GROUP)
        if target.is_local:
            os.replace(part, target.local)
        else:
            target.upload(part)
    finally:
        part.unlink(missing_ok=True)


def _csv_tables(file: Folder, delimiter: str) -> Iterator[pa.Table]:
    fs, path = file.filesystem()
    try:
        with (
            fs.open_input_stream(path) as stream,
            pacsv.open_csv(
                stream,
                read_options=pacsv.ReadOptions(block_size=_BLOCK_BYTES),
                parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            ) as reader,
        ):
            yield from _regrouped(pa.Table.from_batches([batch], reader.schema) for batch in reader)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as {'CSV' if delimiter == ',' else 'TSV'}: {error}; mend the file.") from error


def _regrouped(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of a multiple of `ROWS_PER_GROUP` rows, but for the last."""
    rest: pa.Table | None = None
    for table in tables:
        rest = table if rest is None else pa.concat_tables([rest, table])
        whole = rest.num_rows - rest.num_rows % ROWS_PER_GROUP
        if whole:
            yield rest.slice(0, whole)
            rest = rest.slice(whole)
    if rest is not None and rest.num_rows:
        yield rest


def _json_tables(file: Folder) -> Iterator[pa.Table]:
    """Two passes: the types of all lines together (int and float become float, absent keys null), then the tables."""
    schema = pa.schema([])
    for batch in _json_batches(file):
        keys = list(dict.fromkeys(key for row in batch for key in row))
        try:
            found = pa.schema([(key, pa.array([row.get(key) for row in batch]).type) for key in keys])
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        except (pa.ArrowException, OverflowError) as error:
            raise DataError(f"{file}: a key has values of different types: {error}; give each key one type.") from error
    for batch in _json_batches(file):
        yield pa.Table.from_pylist(batch, schema=schema)


def _json_batches(file: Folder) -> Iterator[list[dict[str, Any]]]:
    fs, path = file.filesystem()
    try:
        with fs.open_input_stream(path) as stream, io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8-sig") as lines:
            if _kind(file.name) == _JSON_DOCUMENT:
                rows = _document_rows(file, lines)
            else:
                rows = (_json_row(file, number, line) for number, line in enumerate(lines, start=1) if line.strip())
            while batch := list(islice(rows, ROWS_PER_GROUP)):
                yield batch
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as JSON lines: {error}; mend the file.") from error


def _document_rows(file: Folder, text: io.TextIOBase) -> Iterator[dict[str, Any]]:
    """The objects of one list, read piece by piece, or the instances of a task file of Super-NaturalInstructions."""
    decoder, rest, number = json.JSONDecoder(), text.read(_READ_CHARACTERS).lstrip(), 0
    if not rest.startswith("["):
        yield from _instances(file, rest + text.read())
        return
    place = 1
    while True:
        while place < len(rest) and rest[place] in " \t\r\n,":
            place += 1
        try:
            row, place = decoder.raw_decode(rest, place)
        except json.JSONDecodeError as error:
            if rest.startswith("]", place):
                return
            # Twice as much each time, so that a long row is not parsed over and over.
            if not (more := text.read(max(_READ_CHARACTERS, len(rest) - place))):
                raise DataError(f"{file}: object {number + 1} is not JSON: {error.msg}; mend the file.") from error
            rest, place = rest[place:] + more, 0
            continue
        number += 1
        if not isinstance(row, dict):
            raise DataError(f"{file}: element {number} is {type(row).__name__}, not an object; each must be one.")
        yield row


def _instances(file: Folder, text: str) -> Iterator[dict[str, Any]]:
    try:
        content = json.loads(text)
        yield from ({"input": row["input"], "output": row["output"]} for row in content["Instances"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is neither a list of objects nor a task file with `Instances` ({error}); give JSON lines, or one list."
        ) from error


def _json_row(file: Folder, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{number}: not JSON: {error.msg}; each line must be one object.") from error
    if not isinstance(row, dict):
        raise DataError(f"{file}:{number}: holds {type(row).__name__}, not an object; each line must be one object.")
    return row
