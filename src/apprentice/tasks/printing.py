"""Values as the text of a prompt: what Python alone would print in its own form is no text, and an error instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jinja2

_SHOWN = 60  # characters of a value in a message


class PythonForm(jinja2.TemplateRuntimeError):
    """A list, a mapping, bytes or nothing stands where a text is to be."""


def is_text(value: Any) -> bool:
    """False for what has no form but Python's own: collections, bytes and None."""
    return isinstance(value, str | jinja2.Undefined) or not (value is None or isinstance(value, Iterable))


def text_of(value: Any) -> str:
    """`value` as text. Raises `PythonForm` for a value that has none."""
    if not is_text(value):
        raise PythonForm(_refusal(value))
    return str(value)


def _refusal(value: Any) -> str:
    if value is None:
        return "None would be printed for a value that is not there; say what stands for it, as in `default('unknown', true)`"
    if isinstance(value, bytes | bytearray):
        return f"bytes would be printed as Python writes them, {_shown(value)}; give `encoding` in the source"
    if isinstance(value, Mapping):
        key = next((name for name in value if isinstance(name, str)), "key")
        return f"a mapping would be printed as Python writes it, {_shown(value)}; say which part is meant, as in `answer.{key}`"
    if isinstance(value, list | tuple):
        remedy = "say which part is meant, as in `answer[0]`, or join them, as in `answer | join(', ')`"
        return f"a list would be printed as Python writes it, {_shown(value)}; {remedy}"
    return f"{type(value).__name__} would be printed as Python writes it; join its parts, as in `answer | join(', ')`"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
