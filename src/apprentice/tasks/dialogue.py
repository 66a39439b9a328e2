"""Dialogue: a conversation with functions, calls, results and thoughts, in one form whatever record it was read from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function; `arguments` is the text of a JSON object, or what a model wrote in its place."""

    name: str
    arguments: str

    @property
    def values(self) -> dict[str, Any] | None:
        """The arguments by name; None where they are no JSON object."""
        try:
            values = json.loads(self.arguments)
        except (ValueError, RecursionError):
            return None
        return values if isinstance(values, dict) else None

    def as_dict(self) -> dict[str, Any]:
        """{"name": …, "arguments": {…}}; arguments that are no JSON object stay a text."""
        values = self.values
        return {"name": self.name, "arguments": self.arguments if values is None else values}


@dataclass(frozen=True, slots=True)
class DialogueTurn:
    """One turn; of the assistant also the thought before its content, and its calls; `name` is the function of a result."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    reasoning: str | None = None
    calls: tuple[ToolCall, ...] = ()
    name: str = ""

    @property
    def answer(self) -> str:
        """The turn as one text to be scored: its calls as a JSON list of names and arguments, or its content."""
        return write_calls(self.calls) if self.calls else self.content


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation that ends with a turn of the assistant; `tools` are the functions it may call, as JSON in OpenAI's form."""

    turns: tuple[DialogueTurn, ...]
    tools: tuple[str, ...] = ()


def are_same_calls(one: tuple[ToolCall, ...], other: tuple[ToolCall, ...]) -> bool:
    """True if both call the same functions with equal arguments, in any order; 1 is 1.0 and neither "1" nor true."""
    return sorted(map(_canonical, one)) == sorted(map(_canonical, other))


def _canonical(call: ToolCall) -> str:
    return json.dumps(_plain(call.as_dict()), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def write_calls(calls: tuple[ToolCall, ...]) -> str:
    """Calls as a JSON list of names and arguments."""
    return json.dumps([call.as_dict() for call in calls], ensure_ascii=False)


def read_calls(text: str) -> tuple[ToolCall, ...]:
    """The calls that `write_calls` wrote; empty for any other text."""
    try:
        values = json.loads(text) if text.lstrip().startswith("[") else []
        return tuple(ToolCall(value["name"], json.dumps(value["arguments"], ensure_ascii=False)) for value in values)
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
