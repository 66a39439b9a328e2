"""Check of a function call's arguments against its JSON Schema: types, required and unknown names, enumerations, nested values.

Keywords that are not known here (`$ref`, `pattern`, bounds …) do not restrict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": Mapping,
    "null": type(None),
}


def fault_in(value: Any, schema: Any, place: str = "") -> str | None:
    """The first thing in `value` that breaks `schema`, in a few words that name its place; None if nothing does."""
    if not isinstance(schema, Mapping):
        return None
    where = repr(place) if place else "the arguments"
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        faults = [fault_in(value, one, place) for one in alternatives]
        return None if None in faults else faults[0]
    kinds = schema.get("type")
    names = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list | tuple) else []
    if names and not any(_is_of(value, name) for name in names):
        return f"{where} is {value!r}, which is no {' or '.join(map(str, names))}"
    if isinstance(options := schema.get("enum"), list | tuple) and value not in options:
        return f"{where} is {value!r}, which is none of {', '.join(map(repr, options))}"
    if isinstance(value, Mapping):
        return _fault_in_object(value, schema, place)
    if isinstance(value, list):
        return next((fault for inner in value if (fault := fault_in(inner, schema.get("items"), f"{place}[]"))), None)
    return None


def _fault_in_object(value: Mapping[str, Any], schema: Mapping[str, Any], place: str) -> str | None:
    before = f"{place}." if place else ""
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    if missing := [name for name in schema.get("required") or () if name not in value]:
        return f"{before + missing[0]!r} is missing"
    if properties or schema.get("additionalProperties") is False:
        extra = schema.get("additionalProperties")
        if not extra and (unknown := [name for name in value if name not in properties]):
            return f"{before + unknown[0]!r} is no argument"
    faults = (fault_in(inner, properties.get(name), before + name) for name, inner in value.items())
    return next((fault for fault in faults if fault), None)


def _is_of(value: Any, name: str) -> bool:
    kind = _TYPES.get(name)
    if kind is None:
        return True
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, kind) or (name == "integer" and isinstance(value, float) and value.is_integer())
