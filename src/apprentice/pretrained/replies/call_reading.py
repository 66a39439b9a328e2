"""Readers of one function call's text, for each kind of call syntax."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from apprentice.pretrained.replies.reply_syntax import CallSyntax
from apprentice.tasks.dialogue import ToolCall

_JSON_WORDS = {"true": True, "false": False, "null": None}


class JsonScanner:
    """Finds the end of a JSON object or list that comes in pieces; `depth` is the number of open brackets so far."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._is_text = self._is_escaped = False

    def end_of(self, piece: str) -> int | None:
        """Index in `piece` behind the bracket that closes the value; None if it goes on."""
        for place, character in enumerate(piece):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_text:
                self._is_escaped, self._is_text = character == "\\", character != '"'
            elif character == '"':
                self._is_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return None


def object_call(form: CallSyntax, text: str) -> ToolCall | None:
    """The call in the JSON object `text`, its keys in any order; None if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name = value.get(form.name_key)
    if not isinstance(name, str):
        return None
    arguments = value.get(form.arguments_key, {})
    return ToolCall(name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def field_call(form: CallSyntax, text: str, schemas: Mapping[str, Mapping[str, Any]]) -> ToolCall | None:
    """The call in `text`, whose arguments stand in tags, with their types from the function's schema; None if it is none."""
    middle, opening = form.middle.strip(), form.key_opening.strip()
    head = re.match(rf"\s*([\w.\-/:]+)\s*{re.escape(middle)}\s*", text)
    if head is None:
        return None
    properties = schemas.get(head[1], {}).get("properties") or {}
    closing, behind = form.key_closing.strip(), form.value_closing.strip()
    newline = "\n?" if form.key_closing.endswith("\n") else ""
    pattern = rf"{re.escape(opening)}(.*?){re.escape(closing)}{newline}(.*?){newline}{re.escape(behind)}"
    values = {
        match[1].strip(): _typed(match[2], properties.get(match[1].strip()))
        for match in re.finditer(pattern, text[head.end() :], re.DOTALL)
    }
    return ToolCall(head[1], json.dumps(values, ensure_ascii=False))


def _typed(text: str, schema: Any) -> Any:
    """An argument's value: a text where its schema says so; else what it spells as JSON, or the text itself."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    if kinds == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def python_end(text: str) -> int:
    """Length of the call, as Python writes it, at the start of `text`; 0 if it goes on."""
    depth, quote, is_escaped = 0, "", False
    for place, character in enumerate(text):
        if is_escaped:
            is_escaped = False
        elif quote:
            is_escaped, quote = character == "\\", "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth <= 0:
                return place + 1
    return 0


def python_call(text: str) -> ToolCall | None:
    """The call that `text` writes as Python does, with literals as keyword arguments; None if it is none."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        values = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
        return ToolCall(ast.unparse(call.func), json.dumps(values, ensure_ascii=False))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> Any:
    return _JSON_WORDS[node.id] if isinstance(node, ast.Name) and node.id in _JSON_WORDS else ast.literal_eval(node)
