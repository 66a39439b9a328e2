"""Chat templates: Jinja programs from model folders and recipes that turn messages into a prompt's text.

The text is the same as transformers' (tests compare the two). Unlike there, templates run in the sandbox of task templates with a
bound on their work, and may get a fixed time, so that a template that writes today's date gives the same text every day.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import do_indent
from jinja2.parser import Parser

from apprentice.errors import ChatTemplateError
from apprentice.tasks.templates.budget import start_rendering
from apprentice.tasks.templates.sandbox import chat_environment, compile_template

Message = dict[str, Any]  # `role` and `content`
_MAX_INDENT = 16  # spaces a level
# Errors that a template's program may raise over messages it was not written for.
_FAILURES = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


class ChatTemplate:
    """The compiled chat template `source`; `origin` names it in messages. Raises `ChatTemplateError` if it is not valid Jinja."""

    def __init__(self, source: str, origin: str) -> None:
        self._origin = origin
        try:
            self._compiled = _compiled(source)
            self._source = source
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template of {origin} is not valid Jinja: {_one_line(error)}.") from error

    def render(self, messages: Sequence[Message], *, generate: bool, now: datetime | None = None, **variables: Any) -> str:
        """The text of `messages`; `generate` adds the opening of the assistant's turn, `now` replaces the system clock.

        Raises `ChatTemplateError` where the template fails over the messages.
        """
        start_rendering(self._source, {}, python_forms=True)
        context = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": generate}
        try:
            return self._compiled.render(context, strftime_now=_now if now is None else now.strftime, **variables)
        except _FAILURES as error:
            raise ChatTemplateError(f"the chat template of {self._origin} refuses these messages: {_one_line(error)}.") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


class _Generation(jinja2.ext.Extension):
    """Jinja tag `{% generation %}…{% endgeneration %}`, which marks the assistant's text; renders its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's way to declare them)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_shown"), [], [], body).set_lineno(line)

    def _shown(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace()` that refuses names beginning with an underscore, which are Python's own."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a chat template may not set {name!r} on a namespace")
        super().__setitem__(name, value)


def _namespace(*mappings: Any, **named: Any) -> _Namespace:
    namespace = _Namespace()
    for name, value in dict(*mappings, **named).items():
        namespace[name] = value
    return namespace


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if indent is not None and indent > _MAX_INDENT:
        raise jinja2.TemplateRuntimeError(f"'tojson' indents by at most {_MAX_INDENT}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().strftime(form)  # the local day, as templates expect


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    prefix = width if isinstance(width, str) else " " * min(width, _MAX_INDENT)
    return do_indent(text, prefix[:_MAX_INDENT], first, blank)


_ENVIRONMENT = chat_environment(
    {"tojson": _to_json, "indent": _indent, "safe": str},
    [_Generation, jinja2.ext.loopcontrols],
    raise_exception=_raise_exception,
    namespace=_namespace,
    dict=dict,
)


@lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    return compile_template(_ENVIRONMENT, source)[1]
