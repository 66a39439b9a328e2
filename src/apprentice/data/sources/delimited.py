"""CSV and TSV reader in which every column is text.

`0` beside `0.5`, `true`, `00001`, `1.10`, `NA` and dates can be answers; guessed types would rewrite them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.csv as pacsv

from apprentice.data.sources.column_text import mark_reading
from apprentice.errors import DataError
from apprentice.storage import Folder

_TRIED = ("utf-8", "cp1252")  # encodings that are tried on bytes of unknown encoding
_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")
_SHOWN = 40  # bytes shown in messages around a byte that is not UTF-8


def text_batches(file: Folder, delimiter: str, encoding: str | None, block_bytes: int) -> Iterator[pa.Table]:
    """The rows of a file as tables of about `block_bytes` bytes of text; every column is a string, marked `cell`.

    `encoding` defaults to UTF-8. Raises `DataError` with the file's name, and for a file that is not UTF-8 with an encoding that
    would read it.
    """
    kind = "CSV" if delimiter == "," else "TSV"
    try:
        with _opened(file, delimiter, encoding, block_bytes, ()) as reader:
            names = reader.schema.names
        schema = pa.schema([mark_reading(pa.field(name, pa.string()), "cell") for name in names])
        with _opened(file, delimiter, encoding, block_bytes, names) as reader:
            for batch in reader:
                yield pa.Table.from_arrays(batch.columns, schema=schema)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        if encoding is None and (place := describe_invalid_utf8(file)) is not None:
            raise DataError(place) from error
        message = " ".join(str(error).split())
        raise DataError(
            f"{file} cannot be read as {kind}{f' in {encoding}' if encoding else ''}: {message}; mend the file."
        ) from error


def _opened(file: Folder, delimiter: str, encoding: str | None, block_bytes: int, texts: Sequence[str]) -> pacsv.CSVStreamingReader:
    """A streaming reader of the file; the columns `texts` are strings, the types of others are guessed."""
    fs, path = file.filesystem()
    return pacsv.open_csv(
        fs.open_input_stream(path),
        read_options=pacsv.ReadOptions(block_size=block_bytes, encoding=encoding or "utf8"),
        parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pacsv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
    )


def describe_invalid_utf8(file: Folder) -> str | None:
    """A sentence for an error about the first line that is not UTF-8, with an encoding that reads it; None for a UTF-8 file."""
    fs, path = file.filesystem()
    with fs.open_input_stream(path) as stream, io.BufferedReader(stream) as lines:
        for number, line in enumerate(lines, start=1):
            if _fails(line):
                return f"{file}:{number} is not UTF-8: {suggest_encoding(line.strip())}"
    return None


def _fails(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def _encoding_of(data: bytes) -> str | None:
    """The first likely encoding that decodes `data`; None where none does."""
    if data.startswith(_BYTE_ORDER_MARKS):
        return "utf-16"
    for encoding in _TRIED:
        try:
            data.decode(encoding)
        except UnicodeDecodeError:
            continue
        return encoding
    return None


def suggest_encoding(data: bytes) -> str:
    """Advice for an error: the bytes, a likely encoding, and the text it gives, so that a person sees whether it is right."""
    encoding = _encoding_of(data)
    odd = next((place for place, byte in enumerate(data) if byte > 127), 0)
    data = data[max(0, odd - _SHOWN // 2) :][:_SHOWN]
    if encoding is None:
        return f"{data!r}; say with `encoding: NAME` in the source how it was written, such as cp1251 or shift_jis."
    return (
        f"{data!r}; with `encoding: {encoding}` in the source it reads {data.decode(encoding, errors='ignore').strip()!r}. If that"
        " is not what was written, name the encoding that it was written in."
    )
