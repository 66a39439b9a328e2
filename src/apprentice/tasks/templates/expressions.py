"""The little language that task files are written in: Jinja2 in the sandbox, compiled once.

A name in a template is always a field of the row: there is no `range`, and what is not there is an error. Knows nothing of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes

from apprentice.tasks.templates import isolation
from apprentice.tasks.templates.allowance import CHARACTERS, MAX_WORK, paid, renew
from apprentice.tasks.templates.filters import MAX_REPEAT
from apprentice.tasks.templates.sandbox import LENIENT, STRICT, compiled

__all__ = ["MAX_REPEAT", "Expression", "Wording"]

MAX_CHARACTERS = MAX_WORK * CHARACTERS  # of a text


class Wording:
    """One compiled template: text with `{{ field }}` in it.

    `names` are the variables it needs. Raises `jinja2.TemplateSyntaxError` on construction.
    """

    def __init__(self, source: str, environment: jinja2.Environment = STRICT) -> None:
        self.source = source
        parsed, self._template = compiled(environment, source)
        self.names = frozenset(jinja2.meta.find_undeclared_variables(parsed))
        self._pieces = _pieces(parsed)

    def __call__(self, values: Mapping[str, Any], *, python_forms: bool = False) -> str:
        """The text for these values, stripped. Raises `jinja2.TemplateError` or what an operation inside raises.

        Lists, mappings, bytes and None are errors (`PythonForm`), or with `python_forms` printed as Python writes them.
        """
        renew(self.source, values, python_forms=python_forms)
        if self._pieces is None or not self.names <= values.keys():
            return self._rendered(values)
        parts = [_shown(values[piece]) if is_name else piece for is_name, piece in self._pieces]
        if sum(map(len, parts)) > MAX_CHARACTERS:
            raise jinja2.TemplateRuntimeError(f"the template makes a text of more than {MAX_CHARACTERS:,} characters")
        return "".join(parts).strip()

    def _rendered(self, values: Mapping[str, Any]) -> str:
        return self._template.render(values).strip()

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return type(self), (self.source,)


class ForeignWording(Wording):
    """A template of somebody else's in the language of PromptSource, rendered in a process whose memory and time are bounded.

    What is not there is empty, there are `range`, `zip` and lists that grow, and lists are printed as Python writes them.
    """

    def __init__(self, source: str) -> None:
        super().__init__(source, LENIENT)

    def __call__(self, values: Mapping[str, Any], *, python_forms: bool = True) -> str:
        return super().__call__(values, python_forms=python_forms)

    def _rendered(self, values: Mapping[str, Any]) -> str:
        return isolation.render(self.source, values)


def _shown(value: Any) -> str:
    return value if type(value) is str else str(paid(value))


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
    """One compiled expression, such as `answers.text[0]`; gives a value, not text. `texts` are those that it quotes."""

    def __init__(self, source: str) -> None:
        self.source = source
        parsed, _ = compiled(STRICT, "{{" + source + "}}")
        self.texts = frozenset(node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str))
        self.names = frozenset(jinja2.meta.find_undeclared_variables(parsed))  # folds constants in `parsed`, so it comes last
        self._template = compiled(STRICT, "{% set result = (" + source + "\n) %}")[1]

    def __call__(self, values: Mapping[str, Any], *, python_forms: bool = False) -> Any:
        """The value for these values; `python_forms` as in `Wording`, of what the expression itself joins to text."""
        renew(self.source, values, python_forms=python_forms)
        context = self._template.new_context(dict(values))
        for _ in self._template.root_render_func(context):
            pass
        value = context.vars["result"]
        if isinstance(value, jinja2.Undefined):
            raise jinja2.UndefinedError(f"{self.source!r} is undefined")
        return value

    def __reduce__(self) -> tuple[type[Expression], tuple[str]]:
        return type(self), (self.source,)
