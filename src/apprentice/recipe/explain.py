"""Explanations of a recipe's keys: type, default, description and an example, read from the recipe's JSON Schema.

explain_key("training.optimizer.learning_rate") ─▶ number above 0, default 0.0002, "The greatest, just after the warm-up.", …
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import yaml

from apprentice.errors import RecipeError, did_you_mean
from apprentice.plain_yaml import load_yaml
from apprentice.recipe.recipe import Recipe
from apprentice.recipe.recipe_file import shipped_recipes

Schema = Mapping[str, Any]

_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
BLOCK = "block"
_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "nothing"}


@dataclass(frozen=True)
class KeyExplanation:
    """What a key of a recipe means. `default` and `example` are YAML on one line; `keys` are those inside it, if it is a block."""

    key: str
    type: str
    is_required: bool
    default: str | None
    description: str
    example: str | None
    example_from: str | None  # name of the shipped recipe that has this value; None if it is the default
    keys: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The explanation as an object of `apprentice recipe KEY --json`."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [self.key, f"  {self.type}{self._default_in_words()}", f"  {self.description}"]
        if self.keys:
            lines.append(f"  keys: {', '.join(self.keys)}")
        if self.example is not None:
            source = f"   # as in the recipe {self.example_from}" if self.example_from else ""
            lines.append(f"  example: {self.key}={self.example}{source}")
        return "\n".join(lines)

    def _default_in_words(self) -> str:
        if self.is_required:
            return ", must be given"
        if self.default is None or self.type == BLOCK:
            return ""
        return ", left out by default" if self.default == "null" else f", default {self.default}"


def all_keys() -> list[str]:
    """All keys of a recipe, in its order, with dots between those of blocks: `training.optimizer.learning_rate`."""
    return [*_walk("", _schema())]


def explain_key(key: str) -> KeyExplanation:
    """The explanation of `key`; an empty key is the whole recipe. Raises `RecipeError` for a key that no recipe has."""
    node, is_required = _find(key)
    example, source = _example(key, node)
    return KeyExplanation(
        key or "recipe",
        _type_of(node),
        is_required,
        _inline(node["default"]) if "default" in node else None,
        _description(node),
        example,
        source,
        tuple(name for name in _children(node) if name != "*"),
    )


def takes_value(key: str) -> bool:
    """Whether `key` takes a value on one line: every key but those of blocks."""
    return _type_of(_find(key)[0]) != BLOCK


def possible_values(key: str) -> list[str]:
    """The values that `key` may have where they are a few words, as YAML; empty for any other key, known or not."""
    try:
        node, _ = _find(key)
    except RecipeError:
        return []
    values: list[Any] = []
    for alternative in _resolved(node):
        values += alternative.get("enum", [alternative["const"]] if "const" in alternative else [])
        values += [True, False] if alternative.get("type") == "boolean" else []
    return [_inline(value) for value in values]


def _find(key: str) -> tuple[Schema, bool]:
    """(schema of `key`, whether it must be given). Raises `RecipeError`."""
    node: Schema = _schema()
    is_required = False
    for depth, part in enumerate(parts := key.split(".") if key else []):
        inner = _children(node)
        if part not in inner and "*" not in inner:
            before = ".".join(parts[:depth])
            where = f" Known in {before}: {', '.join(inner)}." if inner and before else ""
            raise RecipeError(f"{key!r} is not a key of a recipe.{did_you_mean(key, all_keys())}{where}")
        is_required = part in _required(node)
        node = inner.get(part) or inner["*"]
    return node, is_required


@cache
def _schema() -> Schema:
    return Recipe.model_json_schema()


def _resolved(node: Schema) -> list[Schema]:
    """The alternatives of a node, references followed; "nothing" is left out where there are others."""
    if "$ref" in node:
        return _resolved(_schema()["$defs"][node["$ref"].rpartition("/")[2]])
    if "anyOf" in node:
        every = [one for alternative in node["anyOf"] for one in _resolved(alternative)]
        return [one for one in every if one.get("type") != "null"] or every
    return [node]


def _children(node: Schema) -> dict[str, Schema]:
    """Keys inside a node; `*` stands for any key of a free mapping."""
    inner: dict[str, Schema] = {}
    for alternative in _resolved(node):
        inner |= alternative.get("properties", {})
        if isinstance(free := alternative.get("additionalProperties"), Mapping):
            inner["*"] = free
        elif free is True:
            inner["*"] = {}
    return inner


def _required(node: Schema) -> set[str]:
    return {name for alternative in _resolved(node) for name in alternative.get("required", ())}


def _walk(prefix: str, node: Schema) -> Iterator[str]:
    for name, inner in _children(node).items():
        if name != "*":
            yield prefix + name
            yield from _walk(f"{prefix}{name}.", inner)


def _type_of(node: Schema) -> str:
    return " or ".join(dict.fromkeys(_one_type(alternative) for alternative in _resolved(node)))


def _one_type(node: Schema) -> str:
    if "enum" in node:
        return "one of " + ", ".join(map(_inline, node["enum"]))
    if "const" in node:
        return _inline(node["const"])
    if node.get("type") == "array":
        entries = [node["items"]] if "items" in node else node.get("prefixItems", [{}])
        return f"list of {' and '.join(dict.fromkeys(_type_of(entry) for entry in entries))}"
    if node.get("type") == "object" or "properties" in node:
        return BLOCK if "properties" in node else "mapping"
    bounds = " and ".join(f"{word} {node[name]:g}" for name, word in _BOUNDS.items() if name in node)
    return f"{_TYPES.get(str(node.get('type')), 'anything')} {bounds}".rstrip()


def _description(node: Schema) -> str:
    texts = [node.get("description"), *(alternative.get("description") for alternative in _resolved(node))]
    return " ".join(next((text for text in texts if text), "A key of the user's own choice.").split())


def _inline(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False)
    return text.removesuffix("...\n").strip()


def _example(key: str, node: Schema) -> tuple[str | None, str | None]:
    """A value of `key`, and the shipped recipe that has it; the default where no recipe has anything else, or None for a block."""
    if _type_of(node) == BLOCK:
        return None, None
    for name, content in _shipped_recipes().items():
        value: Any = content
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None and value != node.get("default"):
            return _inline(value), name
    return (_inline(node["default"]), None) if node.get("default") is not None else (None, None)


@cache
def _shipped_recipes() -> dict[str, Any]:
    return {name: load_yaml(file.read_text(encoding="utf-8")) for name, file in shipped_recipes().items()}
