"""Decoding of stored column values: CSV cells, JSON text for values that no single Arrow type holds, and bytes in an encoding.

Converters mark the columns of their Parquet files in the Arrow field metadata; `Source` carries the marks to `Reader`.
"""

from __future__ import annotations

import json
from typing import Any, Literal, cast

import pyarrow as pa

from apprentice.tasks.templates.cells import Cell

Reading = Literal["cell", "json", "bytes"]
_MARK = b"apprentice.reading"


def mark_reading(field: pa.Field, reading: Reading) -> pa.Field:
    """`field` with `reading` in its metadata."""
    return field.with_metadata({_MARK: reading.encode()})


def readings_of(schema: pa.Schema) -> dict[str, Reading]:
    """Column → how its values are decoded, for the columns that need decoding."""
    readings: dict[str, Reading] = {}
    for field in schema:
        if mark := (field.metadata or {}).get(_MARK):
            readings[field.name] = cast(Reading, mark.decode())
        elif is_bytes(field.type):
            readings[field.name] = "bytes"
    return readings


def is_bytes(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of the binary types."""
    types = pa.types
    return any(test(kind) for test in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view))


def read(value: Any, reading: Reading, encoding: str | None) -> Any:
    """Decodes a stored value. Bytes that are invalid in `encoding` become U+FFFD; None stays None."""
    if value is None:
        return None
    if reading == "json":
        return json.loads(value)
    if reading == "cell":
        return Cell(value)
    return value.decode(encoding, errors="replace") if encoding else value
