"""Conversion of JSON rows to Arrow tables without changing any number.

An Arrow column has one type, so 0 beside 0.5 would become 0.0, and integers of more than 64 bits cannot be stored at all. A
column with such numbers is stored as JSON text, marked to be parsed row by row.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import pyarrow as pa

from apprentice.data.sources.column_text import mark_reading
from apprentice.errors import DataError

ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_BITS_64 = range(-(2**63), 2**63)

Rows = list[dict[str, Any]]
_Kinds = dict[tuple[str, ...], set[str]]  # path of keys, beginning with the column → kinds of numbers found there


def replace_surrogates(value: Any) -> Any:
    """`value` with U+FFFD for each lone surrogate, which cannot be encoded; such rows are counted as broken."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [replace_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {replace_surrogates(key): replace_surrogates(item) for key, item in value.items()}
    return value


def arrow_tables(batches: Callable[[], Iterable[Rows]], name: str, rules: int) -> Iterator[pa.Table]:
    """Arrow tables of `batches`, which is called twice: first for the common schema of all rows, then for the tables.

    Absent keys are null. `rules` is the run's format: in format 1, integers beside fractions become fractions. Raises `DataError`
    for a key whose values have different types; `name` stands for the file in its message.
    """
    schema, kinds = pa.schema([]), _Kinds()
    for batch in batches():
        keys = list(dict.fromkeys(chain.from_iterable(batch)))
        try:
            batch_schema = pa.schema([(key, _type_of([row.get(key) for row in batch])) for key in keys])
            schema = pa.unify_schemas([schema, batch_schema], promote_options="permissive")
        except (pa.ArrowException, OverflowError) as error:
            raise DataError(f"{name}: a key has values of different types: {error}; give each key one type.") from error
        _collect_number_kinds(batch, (), kinds)
    json_columns = {path[0] for path, kind in kinds.items() if "big" in kind or (rules >= 2 and len(kind) > 1)}
    stored_schema = pa.schema(
        [mark_reading(pa.field(field.name, pa.string()), "json") if field.name in json_columns else field for field in schema]
    )
    for batch in batches():
        rows = [_as_json(row, json_columns, schema) for row in batch] if json_columns else batch
        yield pa.Table.from_pylist(rows, schema=stored_schema)


def _type_of(values: list[Any]) -> pa.DataType:
    try:
        return pa.array(values).type
    except (OverflowError, pa.ArrowInvalid):  # a long number, or values of different types: these fail again below
        return pa.array([_without_big_integers(value) for value in values]).type


def _without_big_integers(value: Any) -> Any:
    """`value` with 0 in place of each integer of more than 64 bits."""
    if isinstance(value, list):
        return [_without_big_integers(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_big_integers(item) for key, item in value.items()}
    return 0 if isinstance(value, int) and value not in _BITS_64 else value


def _collect_number_kinds(values: list[Any], path: tuple[str, ...], kinds: _Kinds) -> None:
    """Adds to `kinds` the kinds of numbers in `values`, all of which are at `path`, and below them."""
    types = set(map(type, values))
    if float in types:
        kinds.setdefault(path, set()).add("fraction")
    if int in types:
        kinds.setdefault(path, set()).add("whole")
        if any(type(value) is int and value not in _BITS_64 for value in values):
            kinds[path].add("big")
    if list in types:
        _collect_number_kinds(list(chain.from_iterable(value for value in values if type(value) is list)), path, kinds)
    if dict in types:
        inner = defaultdict[str, list[Any]](list)
        for value in values:
            for key, item in value.items() if type(value) is dict else ():
                inner[key].append(item)
        for key, items in inner.items():
            _collect_number_kinds(items, (*path, key), kinds)


def _as_json(row: Mapping[str, Any], kept: set[str], schema: pa.Schema) -> dict[str, Any]:
    return {
        key: json.dumps(_filled(value, schema.field(key).type), ensure_ascii=False) if key in kept and value is not None else value
        for key, value in row.items()
    }


def _filled(value: Any, kind: pa.DataType) -> Any:
    """`value` with None for the keys of the Arrow type `kind` that it lacks, as Arrow would return it."""
    if isinstance(value, list):
        return [_filled(item, kind.value_type) for item in value]
    if isinstance(value, dict):
        return {field.name: _filled(value.get(field.name), field.type) for field in kind}
    return value
