"""JSON Lines files that grow while a process runs, such as `steps.jsonl`.

A process that is killed, or a machine that loses its power, may leave an incomplete last line or zeros: a torn tail. It is not
read as a record.
"""

from __future__ import annotations

import json
import os
from typing import Any

from apprentice.storage import Folder


def read_records(file: Folder) -> list[dict[str, Any]]:
    """The JSON objects of `file`, without lines that are not one; empty if the file does not exist."""
    return [record for line in _lines(file) if (record := _parsed(line)) is not None]


def cut_torn_tail(file: Folder) -> int:
    """Truncates a local `file` after its last complete record, which then ends with a newline; returns the bytes cut off."""
    lines = _lines(file)
    torn = 0
    while lines and _parsed(lines[-1]) is None:
        torn += len(lines.pop())
    if torn:
        os.truncate(file.local, sum(map(len, lines)))
    if lines and not lines[-1].endswith(b"\n"):
        with file.local.open("ab") as stream:
            stream.write(b"\n")
    return torn


def _lines(file: Folder) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True) if file.exists() else []


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
