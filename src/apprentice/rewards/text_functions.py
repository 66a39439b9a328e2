"""The built-in reward functions of a reply's text: each gives one reply a number, with the right answers of its row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from apprentice.recipe import RewardTerm
from apprentice.rewards.math_answer import same_math_answer

TextFunction = Callable[[str, Sequence[str]], float]  # (reply, right answers) → reward
NEED_ANSWERS = {"exact_match", "math"}  # functions that compare with the right answers


def text_function(term: RewardTerm) -> TextFunction:
    """The function of a term that names a built-in one. Raises `ValueError` for a schema that is none."""
    if term.function == "regex":
        return _regex(str(term.pattern))
    if term.function == "json_schema":
        return _json_schema(term.json_schema or {})
    return {"exact_match": _exact_match, "math": _math}[str(term.function)]


def _exact_match(reply: str, references: Sequence[str]) -> float:
    return float(" ".join(reply.split()) in [" ".join(reference.split()) for reference in references])


def _math(reply: str, references: Sequence[str]) -> float:
    return float(any(same_math_answer(reply, reference) for reference in references))


def _regex(pattern: str) -> TextFunction:
    compiled = re.compile(pattern, re.DOTALL)
    return lambda reply, references: float(compiled.fullmatch(reply.strip()) is not None)


def _json_schema(schema: dict[str, Any]) -> TextFunction:
    from jsonschema.exceptions import SchemaError  # here, because the import takes a tenth of a second
    from jsonschema.validators import validator_for

    _check_references(schema, schema)
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"the schema is no JSON Schema: {error.message}") from error
    validator = kind(schema)

    def fits(reply: str, references: Sequence[str]) -> float:
        try:
            return float(validator.is_valid(json.loads(reply, parse_constant=_refuse)))
        except (ValueError, RecursionError, OverflowError):  # no JSON, or too deep or too large a number to compare
            return 0.0

    return fits


def _check_references(node: Any, schema: dict[str, Any]) -> None:
    """Raises `ValueError` for a `$ref` to an address, which would be fetched, or to nothing in the schema."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key == "$ref" and isinstance(value, str):
            if not value.startswith("#"):
                raise ValueError(f"the schema refers to {value!r} outside itself; put that under $defs")
            place: Any = schema
            for part in value.split("/")[1:]:
                place = _inside(place, part.replace("~1", "/").replace("~0", "~"))
            if place is None:
                raise ValueError(f"the schema refers to {value!r}, which is not in it")
        _check_references(value, schema)


def _inside(node: Any, key: str) -> Any:
    """What `node` holds under one part of a JSON pointer (RFC 6901); None if nothing."""
    if isinstance(node, list):
        return node[int(key)] if key.isdecimal() and int(key) < len(node) else None
    return node.get(key) if isinstance(node, dict) else None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
