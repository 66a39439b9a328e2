"""How the text in a converted column is read: as cells of CSV, as JSON that no single Arrow type holds, or as bytes in an encoding.

A converter marks the columns of its Parquet files; `Source` carries the marks to `Reader`.
"""

from __future__ import annotations

import json
from typing import Any, Literal, cast

import pyarrow as pa

from apprentice.tasks.templates.cells import Cell

Reading = Literal["cell", "json", "bytes"]
_MARK = b"apprentice.reading"


def marked(field: pa.Field, reading: Reading) -> pa.Field:
    """`field` with the mark that says how its text is read."""
    return field.with_metadata({_MARK: reading.encode()})


def readings_of(schema: pa.Schema) -> dict[str, Reading]:
    """Column → how it is read, for those that are not read as they are."""
    found: dict[str, Reading] = {}
    for field in schema:
        if mark := (field.metadata or {}).get(_MARK):
            found[field.name] = cast(Reading, mark.decode())
        elif is_bytes(field.type):
            found[field.name] = "bytes"
    return found


def is_bytes(kind: pa.DataType) -> bool:
    """Whether values of an Arrow type are bytes without an encoding."""
    types = pa.types
    return any(test(kind) for test in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view))


def read(value: Any, reading: Reading, encoding: str | None) -> Any:
    """What a stored value stands for. Bytes that `encoding` does not know become U+FFFD; None stays None."""
    if value is None:
        return None
    if reading == "json":
        return json.loads(value)
    if reading == "cell":
        return Cell(value)
    return value.decode(encoding, errors="replace") if encoding else value
