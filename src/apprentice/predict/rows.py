"""Reader of instruction files, JSONL or Parquet: splits a file into chunks that can be read independently, and marks bad rows.

A row has `instruction` (text) and may have `input` (text); other fields are ignored.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from apprentice.errors import DataError
from apprentice.storage import Folder

ROWS_PER_CHUNK = 256  # enough to fill a batch, and the most that is lost when a worker dies
_BLOCK = 1 << 22


@dataclass(frozen=True)
class RowChunk:
    """Rows [first, first + rows) of the file; `start` is the byte offset of the first one in JSONL, its row group in Parquet."""

    number: int
    first: int
    rows: int
    start: int
    skipped: int = 0  # rows of the row group before `first`


@dataclass(frozen=True)
class InputRow:
    """Row of the input file; `problem` is the reason why the model cannot be asked, or empty."""

    number: int
    instruction: str = ""
    input: str = ""
    problem: str = ""


def split_into_chunks(file: Folder, size: int = ROWS_PER_CHUNK) -> list[RowChunk]:
    """Splits the file into chunks of up to `size` rows; reads a JSONL file once, of a Parquet file the metadata only.

    Raises `DataError` for a file that is neither JSONL nor Parquet, lacks a column `instruction`, or cannot be read.
    """
    try:
        if file.name.endswith((".jsonl", ".ndjson")):
            return _chunks_of_lines(file, size)
        if file.name.endswith((".parquet", ".pq")):
            return _chunks_of_groups(file, size)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read ({' '.join(str(error).split())[:200]}); check the path.") from error
    raise DataError(f"{file} is neither .jsonl nor .parquet; write one row with `instruction` (and `input`) a line.")


def _chunks_of_lines(file: Folder, size: int) -> list[RowChunk]:
    fs, path = file.filesystem()
    starts, lines, place, last = [0], 0, 0, b"\n"
    with fs.open_input_stream(path) as stream:
        while block := stream.read(_BLOCK):
            at = block.find(b"\n")
            while at >= 0:
                lines += 1
                if lines % size == 0:
                    starts.append(place + at + 1)
                at = block.find(b"\n", at + 1)
            place, last = place + len(block), block[-1:]
    lines += last != b"\n"
    return [
        RowChunk(number, number * size, min(size, lines - number * size), start)
        for number, start in enumerate(starts)
        if number * size < lines
    ]


def _chunks_of_groups(file: Folder, size: int) -> list[RowChunk]:
    fs, path = file.filesystem()
    chunks: list[RowChunk] = []
    first = 0
    with fs.open_input_file(path) as source:
        metadata = pq.ParquetFile(source).metadata
        if "instruction" not in metadata.schema.names:
            raise DataError(f"{file} has no column `instruction`; its columns are {', '.join(metadata.schema.names)}.")
        for group in range(metadata.num_row_groups):
            total = metadata.row_group(group).num_rows
            for skipped in range(0, total, size):
                rows = min(size, total - skipped)
                chunks.append(RowChunk(len(chunks), first + skipped, rows, group, skipped))
            first += total
    return chunks


def read_chunk(file: Folder, chunk: RowChunk) -> list[InputRow]:
    """Reads the rows of one chunk, in order; bad rows have a `problem`."""
    fs, path = file.filesystem()
    with fs.open_input_file(path) as source:
        if file.name.endswith((".parquet", ".pq")):
            table = pq.ParquetFile(source)
            columns = [name for name in ("instruction", "input") if name in table.schema_arrow.names]
            values = table.read_row_group(chunk.start, columns=columns).slice(chunk.skipped, chunk.rows).to_pylist()
            return [_check_row(chunk.first + place, value) for place, value in enumerate(values)]
        source.seek(chunk.start)
        lines = io.BufferedReader(source)
        return [_parse_line(chunk.first + place, lines.readline()) for place in range(chunk.rows)]


def _parse_line(number: int, line: bytes) -> InputRow:
    try:
        return _check_row(number, json.loads(line))
    except ValueError as error:  # not JSON, or not UTF-8
        return InputRow(number, problem=f"not JSON: {' '.join(str(error).split())[:100]}")


def _check_row(number: int, value: Any) -> InputRow:
    if not isinstance(value, Mapping):
        return InputRow(number, problem=f"not an object but {type(value).__name__}")
    instruction, text = value.get("instruction"), value.get("input")
    if not isinstance(instruction, str) or not instruction.strip():
        return InputRow(
            number, problem="no `instruction`" if instruction is None else "`instruction` is not a text with something in it"
        )
    if text is not None and not isinstance(text, str):
        return InputRow(number, instruction, problem=f"`input` is not a text but {type(text).__name__}")
    return InputRow(number, instruction, text or "")


def file_sha256(file: Folder) -> str:
    """SHA-256 of the file's bytes, as hex."""
    fs, path = file.filesystem()
    digest = hashlib.sha256()
    with fs.open_input_stream(path) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
