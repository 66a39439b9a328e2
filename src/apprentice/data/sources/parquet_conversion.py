"""Conversion to Parquet in the cache of files without random access (CSV, JSON, Arrow) and of built-in tasks: once, streaming.

A converted file's name has a hash of the original's path, size and modification time and of the reading rules, so that a changed
original is converted again. Beside it lies a digest of the original's content, by which a run recognises its rows. Runs of format 1
keep their rules: CSV column types are guessed, and a JSON column has one type of number. Several processes may convert the same
file at once: each writes a temporary file, and the last rename wins.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from apprentice.data.sources.delimited import describe_invalid_utf8, text_batches
from apprentice.data.sources.json_columns import ESCAPED_SURROGATE, arrow_tables, replace_surrogates
from apprentice.errors import DataError, MissingError, StorageError
from apprentice.run.identity import FORMAT
from apprentice.storage import Folder
from apprentice.tasks import builtin

ROWS_PER_GROUP = 4096  # small, because a window reads whole row groups
_BLOCK_BYTES = 16 * 2**20  # of a CSV file
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = {".jsonl", ".ndjson"}
_JSON_DOCUMENT = ".json"  # one list of objects, or a task file of Super-NaturalInstructions
_READ_CHARACTERS = 2**20  # read of a JSON document at a time
_COMPRESSIONS = {".gz", ".bz2", ".zst", ".lz4"}
_ARROW = {".arrow", ".feather"}
_ARROW_MAGIC = b"ARROW1"  # how a random access file begins
_SAVED_STATE = "state.json"  # in a folder that `datasets.Dataset.save_to_disk` wrote


def parquet_file(path: str, cache: Folder, task: str, *, encoding: str | None = None, rules: int = FORMAT) -> str:
    """`path` itself if it is Parquet, else the Parquet file under `cache` that it is converted to.

    `encoding` is that of a text file, UTF-8 by default; `rules` is the format of the run that reads. Raises `DataError` for a file
    that is missing, of an unknown kind, or broken (with the line where it is known).
    """
    file = Folder.at(path)
    fs, inside = file.filesystem()
    info = fs.get_file_info(inside)
    if info.type == pafs.FileType.Directory:
        return _saved_to_disk(file, cache, task)
    if info.type != pafs.FileType.File:
        raise DataError(f"task {task!r}: {file} does not exist; correct `files` in the task's file.")
    kind = _kind(file.name)
    if kind == ".parquet":
        return file.uri
    if kind in _ARROW:
        return _converted(file, [file], cache, lambda: _arrow_tables([file]))
    way = "" if rules < 2 and encoding is None else f"{rules} {encoding}"
    if kind in _DELIMITERS:
        delimiter = _DELIMITERS[kind]
        if rules < 2:
            return _converted(file, [file], cache, lambda: _typed_csv_tables(file, delimiter, encoding), way)
        return _converted(file, [file], cache, lambda: _regrouped(text_batches(file, delimiter, encoding, _BLOCK_BYTES)), way)
    if kind in (*_JSON_LINES, _JSON_DOCUMENT):
        batches = partial(_json_batches, file, encoding)
        return _converted(file, [file], cache, lambda: arrow_tables(batches, str(file), rules), way)
    raise DataError(
        f"task {task!r}: {file} is of no kind that can be read; give Parquet (.parquet), Arrow (.arrow), JSON (.jsonl, .ndjson,"
        " .json), .csv or .tsv, the last three kinds also compressed (.gz, .bz2, .zst)."
    )


def is_saved_to_disk(folder: Folder) -> bool:
    """True for a folder that `datasets.Dataset.save_to_disk` wrote: Arrow files, and their order in `state.json`."""
    return (folder / _SAVED_STATE).exists()


def _saved_to_disk(folder: Folder, cache: Folder, task: str) -> str:
    if not is_saved_to_disk(folder):
        splits = [child.name for child in folder.children() if is_saved_to_disk(child)]
        remedy = f"name the folder of one split: {', '.join(splits)}" if splits else "give a file, or a folder of `save_to_disk`"
        raise DataError(f"task {task!r}: {folder} is a folder without {_SAVED_STATE}; {remedy}.")
    try:
        files = [folder / entry["filename"] for entry in (folder / _SAVED_STATE).read_json()["_data_files"]]
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder / _SAVED_STATE} does not list the folder's Arrow files; save the dataset again.") from error
    return _converted(folder, files, cache, lambda: _arrow_tables(files))


def _converted(
    origin: Folder, files: Sequence[Folder], cache: Folder, tables: Callable[[], Iterator[pa.Table]], way: str = ""
) -> str:
    """The converted file of `origin`; written from `tables` unless it exists for these `files` and this `way` of reading."""
    key = _key(origin, files, way)
    target = cache / "converted" / f"{origin.name}-{key[:16]}.parquet"
    if not target.exists():
        _write(tables(), target, origin)
        digest = _digest_of(files, way)
        if _key(origin, files, way) == key:  # else the originals changed meanwhile, and nobody knows which content was converted
            _digest_file(target).write_text(digest)
    return target.uri


def _key(origin: Folder, files: Sequence[Folder], way: str) -> str:
    """SHA-256 of paths, sizes and modification times of `files`, and of the way that they are read."""
    key = hashlib.sha256()
    for file in files:
        fs, inside = file.filesystem()
        info = fs.get_file_info(inside)
        if info.type != pafs.FileType.File:
            raise DataError(f"{file} does not exist; put it back, or save {origin} again.")
        key.update(f"{file.uri}\n{info.size}\n{info.mtime_ns}\n{ROWS_PER_GROUP}{way}".encode())
    return key.hexdigest()


def builtin_file(name: str, split: str, cache: Folder) -> str:
    """The Parquet file under `cache` with the rows of the built-in generator `name`."""
    target = cache / "builtin" / f"{name}-v{builtin.VERSION}-{split}.parquet"
    if not target.exists():
        rows = builtin.rows(name, cast(Literal["train", "test"], split))
        _write(iter([pa.Table.from_pylist(rows)]), target, target)
        _digest_file(target).write_text(target.name)  # the version is in the name
    return target.uri


def original_digest(file: str, cache: Folder) -> str | None:
    """Digest of what a file under `cache` was converted from and how it was read; None for a file that was not converted.

    It does not depend on the version of pyarrow that wrote the Parquet file, as the file's footer does.
    """
    converted = Folder.at(file)
    if not converted.uri.startswith(f"{cache.uri}/"):
        return None
    try:
        return _digest_file(converted).read_text()
    except MissingError:  # converted by an earlier version, or from a file that changed meanwhile
        return None


def _digest_file(converted: Folder) -> Folder:
    return Folder.at(f"{converted.uri}.sha256")


def _digest_of(files: Sequence[Folder], way: str) -> str:
    """SHA-256 of the content of `files` and of the way that they are read."""
    digest = hashlib.sha256(way.encode())
    for file in files:
        fs, path = file.filesystem()
        with fs.open_input_stream(path, compression=None) as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def write_rows(rows: Sequence[dict[str, Any]], target: Folder) -> None:
    """Writes rows to a Parquet file without changing any number (see `json_columns`)."""
    batches = [list(rows[start : start + ROWS_PER_GROUP]) for start in range(0, len(rows), ROWS_PER_GROUP)]
    _write(arrow_tables(lambda: batches, target.name, FORMAT), target, target)


def _kind(name: str) -> str:
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in _COMPRESSIONS else path.suffix


def _write(tables: Iterator[pa.Table], target: Folder, origin: Folder) -> None:
    """Writes a temporary file beside the target and renames it; for an object store, a local file that is then uploaded."""
    here = target.local.parent if target.is_local else Path(tempfile.gettempdir())
    try:
        here.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{here} cannot be made ({error.strerror or error}); choose another `storage`.") from error
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


def _arrow_tables(files: Sequence[Folder]) -> Iterator[pa.Table]:
    return _regrouped(pa.Table.from_batches([batch]) for file in files for batch in _arrow_batches(file))


def _arrow_batches(file: Folder) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow file in either IPC format: stream (which `datasets` writes) or file."""
    fs, path = file.filesystem()
    try:
        with fs.open_input_file(path) as stream:
            is_file = stream.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
            stream.seek(0)
            if is_file:
                reader = pa.ipc.open_file(stream)
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                yield from pa.ipc.open_stream(stream)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Arrow: {error}; mend the file.") from error


def _typed_csv_tables(file: Folder, delimiter: str, encoding: str | None) -> Iterator[pa.Table]:
    """CSV tables as runs of format 1 read them: column types are guessed from the first block."""
    fs, path = file.filesystem()
    try:
        with (
            fs.open_input_stream(path) as stream,
            pacsv.open_csv(
                stream,
                read_options=pacsv.ReadOptions(block_size=_BLOCK_BYTES, encoding=encoding or "utf8"),
                parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            ) as reader,
        ):
            yield from _regrouped(pa.Table.from_batches([batch], reader.schema) for batch in reader)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as {'CSV' if delimiter == ',' else 'TSV'}: {error}; mend the file.") from error


def _regrouped(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of a multiple of `ROWS_PER_GROUP` rows, except the last."""
    rest: pa.Table | None = None
    for table in tables:
        rest = table if rest is None else pa.concat_tables([rest, table])
        whole = rest.num_rows - rest.num_rows % ROWS_PER_GROUP
        if whole:
            yield rest.slice(0, whole)
            rest = rest.slice(whole)
    if rest is not None and rest.num_rows:
        yield rest


def _json_batches(file: Folder, encoding: str | None) -> Iterator[list[dict[str, Any]]]:
    fs, path = file.filesystem()
    try:
        with (
            fs.open_input_stream(path) as stream,
            io.TextIOWrapper(io.BufferedReader(stream), encoding=encoding or "utf-8-sig") as lines,
        ):
            if _kind(file.name) == _JSON_DOCUMENT:
                rows = _document_rows(file, lines)
            else:
                rows = (_json_row(file, number, line) for number, line in enumerate(lines, start=1) if line.strip())
            while batch := list(islice(rows, ROWS_PER_GROUP)):
                yield batch
    except UnicodeError as error:
        if encoding is None and (place := describe_invalid_utf8(file)) is not None:
            raise DataError(place) from error
        raise DataError(
            f"{file} cannot be read as JSON in {encoding}: {error}; mend the file, or name another encoding."
        ) from error
    except OSError as error:
        raise DataError(f"{file} cannot be read as JSON: {error}; mend the file.") from error


def _document_rows(file: Folder, text: io.TextIOBase) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list, parsed incrementally, or the instances of a task file of Super-NaturalInstructions."""
    decoder, rest, number = json.JSONDecoder(), text.read(_READ_CHARACTERS).lstrip(), 0
    if not rest.startswith("["):
        yield from _instances(file, rest + text.read())
        return
    place = 1
    while True:
        while place < len(rest) and rest[place] in " \t\r\n,":
            place += 1
        start = place
        try:
            row, place = decoder.raw_decode(rest, place)
        except json.JSONDecodeError as error:
            if rest.startswith("]", place):
                return
            # The buffer doubles, so that a long row is not parsed again for every block of text.
            if not (more := text.read(max(_READ_CHARACTERS, len(rest) - place))):
                raise DataError(f"{file}: object {number + 1} is not JSON: {error.msg}; mend the file.") from error
            rest, place = rest[place:] + more, 0
            continue
        number += 1
        if not isinstance(row, dict):
            raise DataError(f"{file}: element {number} is {type(row).__name__}, not an object; each must be one.")
        yield replace_surrogates(row) if ESCAPED_SURROGATE.search(rest, start, place) else row


def _instances(file: Folder, text: str) -> Iterator[dict[str, Any]]:
    try:
        content = replace_surrogates(json.loads(text)) if ESCAPED_SURROGATE.search(text) else json.loads(text)
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
    return replace_surrogates(row) if ESCAPED_SURROGATE.search(line) else row
