"""Tables that need no wordings: conversations and preference pairs, and the rows of a dataset on the hub, for `apprentice init`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from apprentice.data.sources.locate import hub_files
from apprentice.errors import DataError
from apprentice.storage import Folder
from apprentice.tasks.source_spec import SourceSpec

MOST_HUB_ROWS = 100_000  # that are copied of a dataset on the hub
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_ENDS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".gz", ".bz2", ".zst")
# The columns of each kind of table that a recipe takes as it is; those after the first ones may be missing.
KINDS = {"preferences": ("chosen", "rejected", "prompt", "system"), "conversations": ("messages", "conversations", "system")}


def ready_kind(row: Mapping[str, Any]) -> str | None:
    """`preferences` or `conversations`, if the row's columns are those of such a table; None for any other."""
    if row.get("chosen") and row.get("rejected"):
        return "preferences"
    turns = [row[column] for column in ("messages", "conversations") if isinstance(row.get(column), list)]
    return "conversations" if any(isinstance(message, Mapping) for messages in turns for message in messages) else None


def ready_columns(kind: str, row: Mapping[str, Any]) -> list[str]:
    """The columns of `row` that a table of this kind has."""
    return [column for column in KINDS[kind] if column in row]


def is_hub_name(file: Path) -> bool:
    """True for `owner/name`, where no such file or folder is here."""
    return bool(_HUB_NAME.fullmatch(str(file))) and not file.exists() and not str(file).lower().endswith(_FILE_ENDS)


def hub_rows(name: str) -> Iterator[dict[str, Any]]:
    """The training rows of a dataset on the hub, at most `MOST_HUB_ROWS`; labels have their names where the dataset gives them.

    Raises `DataError` in one sentence where the hub or the dataset cannot be reached.
    """
    try:
        files = hub_files("own", SourceSpec(hub=name), "train")
    except DataError as error:
        said = str(error).removeprefix("task 'own': ").replace("correct data.root, or check", "check")
        raise DataError(said.replace("correct `splits` or `config` of that source", "name a dataset that has one")) from error
    yield from islice(_rows_of(files), MOST_HUB_ROWS)


def _rows_of(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        fs, path = Folder.at(file).filesystem()
        with fs.open_input_file(path) as stream:
            table = pq.ParquetFile(stream)
            names = label_names(table.schema_arrow)
            for batch in table.iter_batches():
                yield from (named_labels(row, names) for row in batch.to_pylist())


def label_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Column → names of its labels, as the `datasets` library keeps them in a file's metadata; empty without these."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return {
        column: kind["names"] for column, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"
    }


def named_labels(row: dict[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The row with names in place of label numbers; a number without a name, such as -1, becomes None."""
    changed = {
        column: known[row[column]] if isinstance(row[column], int) and 0 <= row[column] < len(known) else None
        for column, known in names.items()
        if column in row
    }
    return row | changed
