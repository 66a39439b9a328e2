"""Jinja2 in a sandbox, compiled once: the little language that task files are written in.

Templates and expressions come from files that may be a stranger's, so they cannot reach Python's attributes,
cannot build huge strings by repetition, and have no `range`: every loop goes over something in the row. Knows nothing of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_REPEAT = 100_000  # characters or items that `*` may build


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        length = max((len(side) for side in (left, right) if isinstance(side, str | list | tuple)), default=0)
        number = max((side for side in (left, right) if isinstance(side, int | float)), default=0)
        if length * number > MAX_REPEAT or (operator == "**" and number > 64):
            raise jinja2.TemplateRuntimeError(f"{operator!r} would build something too large")
        return super().call_binop(context, operator, left, right)


_ENVIRONMENT = _Sandbox(undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=False)
_ENVIRONMENT.globals.clear()  # no `range`, no `lipsum`: a name in a template is always a field of the row


class Wording:
    """One compiled template: text with `{{ field }}` in it.

    `names` are the variables it needs. Raises `jinja2.TemplateSyntaxError` on construction.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        parsed = _ENVIRONMENT.parse(source)
        self.names = frozenset(jinja2.meta.find_undeclared_variables(parsed))
        self._pieces = _pieces(parsed)
        self._template = _ENVIRONMENT.from_string(source)

    def __call__(self, values: Mapping[str, Any]) -> str:
        """The text for these values, stripped. Raises `jinja2.TemplateError` or what an operation inside raises."""
        if self._pieces is None or not self.names <= values.keys():
            return self._template.render(values).strip()
        return "".join([str(values[piece]) if is_name else piece for is_name, piece in self._pieces]).strip()

    def __reduce__(self) -> tuple[type[Wording], tuple[str]]:
        return type(self), (self.source,)


def _pieces(parsed: nodes.Template) -> list[tuple[bool, str]] | None:
    """(is a name, text or name) in order if a template is only text and bare fields, as most are: rendering it needs no Jinja."""
    found: list[tuple[bool, str]] = []
    for node in (node for output in parsed.body for node in (output.nodes if isinstance(output, nodes.Output) else [output])):
        if isinstance(node, nodes.TemplateData):
            found.append((False, node.data))
        elif isinstance(node, nodes.Name):
            found.append((True, node.name))
        else:
            return None
    return found


class Expression:
    """One compiled expression, such as `answers.text[0]`; gives a value, not text."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.names = frozenset(jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse("{{" + source + "}}")))
        self._evaluate = _ENVIRONMENT.compile_expression(source, undefined_to_none=False)

    def __call__(self, values: Mapping[str, Any]) -> Any:
        value = self._evaluate(values)
        if isinstance(value, jinja2.Undefined):
            raise jinja2.UndefinedError(f"{self.source!r} is undefined")
        return value

    def __reduce__(self) -> tuple[type[Expression], tuple[str]]:
        return type(self), (self.source,)
