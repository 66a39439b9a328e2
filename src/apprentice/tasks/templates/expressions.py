"""Expression language of task files: Jinja2 in the sandbox, compiled once.

In the strict sandbox every name is a field of the row: there is no `range`, and an undefined name is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes

from apprentice.tasks.templates import isolation
from apprentice.tasks.templates.budget import CHARACTERS, MAX_WORK, charge, start_rendering
from apprentice.tasks.templates.jinja_filters import MAX_REPEAT
from apprentice.tasks.templates.sandbox import LENIENT, STRICT, compile_template

__all__ = ["MAX_REPEAT", "Expression", "Wording"]

MAX_CHARACTERS = MAX_WORK * CHARACTERS  # most characters of a rendered text


class Wording:
    """A compiled template: text with `{{ field }}` in it.

    `names` are the variables that it uses. Raises `jinja2.TemplateSyntaxError` on construction.
    """

    def __init__(self, source: str, environment: jinja2.Environment = STRICT) -> None:
        self.source = source
        parsed, self._template = compile_template(environment, source)
        self.names = frozenset(jinja2.meta.find_undeclared_variables(parsed))
        self._plain_parts = _plain_parts(parsed)

    def __call__(self, values: Mapping[str, Any], *, python_forms: bool = False) -> str:
        """The text for these values, stripped. Raises `jinja2.TemplateError`, or what an operation in the template raises.

        Lists, mappings, bytes and None raise `PythonForm`; with `python_forms` they are printed as Python writes them.
        """
        start_rendering(self.source, values, python_forms=python_forms)
        if self._plain_parts is None or not self.names <= values.keys():
            return self._rendered(values)
        parts = [_shown(values[piece]) if is_name else piece for is_name, piece in self._plain_parts]
        if sum(map(len, parts)) > MAX_CHARACTERS:
            raise jinja2.TemplateRuntimeError(f"the template makes a text of more than {MAX_CHARACTERS:,} characters")
        return "".join(parts).strip()

    def _rendered(self, values: Mapping[str, Any]) -> str:
        return self._template.render(values).strip()

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return type(self), (self.source,)


class PromptSourceWording(Wording):
    """A template of a third party, in PromptSource's dialect, rendered in a process with bounded memory and time.

    An undefined name is empty, `range`, `zip` and growing lists exist, and lists are printed as Python writes them.
    """

    def __init__(self, source: str) -> None:
        super().__init__(source, LENIENT)

    def __call__(self, values: Mapping[str, Any], *, python_forms: bool = True) -> str:
        return super().__call__(values, python_forms=python_forms)

    def _rendered(self, values: Mapping[str, Any]) -> str:
        return isolation.render(self.source, values)


def _shown(value: Any) -> str:
    return value if type(value) is str else str(charge(value))


def _plain_parts(parsed: nodes.Template) -> list[tuple[bool, str]] | None:
    """The parts of a template of only text and bare fields, as most are, which is rendered without Jinja; else None.

    Each part is (whether it is a name, the text or name).
    """
    parts: list[tuple[bool, str]] = []
    for node in (node for output in parsed.body for node in (output.nodes if isinstance(output, nodes.Output) else [output])):
        if isinstance(node, nodes.TemplateData):
            parts.append((False, node.data))
        elif isinstance(node, nodes.Name):
            parts.append((True, node.name))
        else:
            return None
    return parts


class Expression:
    """A compiled expression, such as `answers.text[0]`, which gives a value of any type.

    `names` are the variables that it uses, `texts` the string constants in it. Raises `jinja2.TemplateSyntaxError` on
    construction.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        parsed, _ = compile_template(STRICT, "{{" + source + "}}")
        self.texts = frozenset(node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str))
        self.names = frozenset(jinja2.meta.find_undeclared_variables(parsed))  # folds constants in `parsed`, so it comes last
        self._template = compile_template(STRICT, "{% set result = (" + source + "\n) %}")[1]

    def __call__(self, values: Mapping[str, Any], *, python_forms: bool = False) -> Any:
        """The value for these values of the fields; `python_forms` as in `Wording`, for text that the expression itself joins.

        Raises `jinja2.TemplateError`, or what an operation in the expression raises.
        """
        start_rendering(self.source, values, python_forms=python_forms)
        context = self._template.new_context(dict(values))
        for _ in self._template.root_render_func(context):
            pass
        value = context.vars["result"]
        if isinstance(value, jinja2.Undefined):
            raise jinja2.UndefinedError(f"{self.source!r} is undefined")
        return value

    def __reduce__(self) -> tuple[type[Expression], tuple[str]]:
        return type(self), (self.source,)
