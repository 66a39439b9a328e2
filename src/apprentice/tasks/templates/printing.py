"""Text forms of values for prompts and messages; values that only Python's own notation can print are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2

_SHOWN = 60  # characters of a value in a message
_LISTED = 6  # choices in a message


class PythonForm(jinja2.TemplateRuntimeError):
    """A list, a mapping, bytes or None stands where text is needed."""


def is_text(value: Any) -> bool:
    """Whether a value has a text form other than Python's notation; false for collections, bytes and None."""
    return isinstance(value, str | jinja2.Undefined) or not (value is None or isinstance(value, Iterable))


def text_of(value: Any) -> str:
    """`value` as text. Raises `PythonForm` for a value without a text form."""
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


def unknown_label(label: Any, choices: Sequence[str]) -> str:
    """Message on a `label` that is not the index of one of `choices`, with a remedy."""
    shown = ", ".join(f"{place} {choice!r}" for place, choice in enumerate(choices[:_LISTED]))
    shown += f", … {len(choices) - 1} {choices[-1]!r}" if len(choices) > _LISTED else ""
    if isinstance(label, str):
        remedy = "a text becomes one with `label: \"['first', 'second'].index(field)\"`, its values in the order of the choices"
    else:
        remedy = "correct `label`, as in `label - 1` where labels count from 1, or leave such rows out with `keep`"
    return f"label {label!r} is not the number of a choice ({shown}); {remedy}."
