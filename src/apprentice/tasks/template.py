"""A template, which is one wording of a task, and the example that it makes of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import jinja2
from pydantic import Field, PrivateAttr, field_validator, model_validator

from apprentice.tasks.dialogue import Dialogue
from apprentice.tasks.importers.dialogue_rows import worded_dialogue
from apprentice.tasks.source_spec import TaskFileModel
from apprentice.tasks.templates.expressions import Expression, Wording
from apprentice.tasks.templates.printing import text_of

REPLACEMENT_CHARACTER = "�"


@dataclass(frozen=True, slots=True)
class Example:
    """A rendered template: instruction, input and target, with the task and template that it came from."""

    task: str
    template: str
    instruction: str
    input: str
    target: str
    choices: tuple[str, ...] = ()  # empty: scored by generation
    references: tuple[str, ...] = ()  # all answers that count as right
    history: tuple[tuple[str, str], ...] = ()  # earlier (question, answer) pairs of a conversation; the answers are trained on too
    system: str = ""  # the conversation's own system text
    rejected: str = ""  # the worse answer of a preference pair
    is_desirable: bool | None = None  # label of the answer; None where answers have none
    dialogue: Dialogue | None = None  # of a conversation with functions or thoughts: all of it, in place of history and system

    @property
    def has_turns(self) -> bool:
        """True if only a chat format can express it: it has a history, a system text or functions."""
        return bool(self.history or self.system or self.dialogue)


def compiled_wording(text: str) -> str:
    """`text` itself, checked to be a valid template. Raises `ValueError`."""
    try:
        Wording(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"not a Jinja2 template: {error.message}") from error
    return text


def checked_expression(source: Any) -> Any:
    """`source` itself, checked to be a valid expression if it is a text. Raises `ValueError`."""
    try:
        if isinstance(source, str):
            Expression(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"not a Jinja2 expression: {error.message}") from error
    return source


class Template(TaskFileModel):
    """One wording of a task."""

    name: str
    instruction: str
    input: str = ""
    output: str = "{{ answer }}"
    choices: tuple[str, ...] | str | None = Field(
        None,
        description="Choices of its own, in the order of the task's: a list, or an expression over the row. A list that is longer"
        " than a row's choices is cut to their number.",
    )
    inverted: bool = Field(False, description="The answer is given and the input is asked for.")
    cot: bool = Field(False, description="Chain of thought: the output holds the reasoning and then the answer.")
    tools: str | None = Field(
        None,
        description="Expression over the row: functions that may be called, in OpenAI's form; the output is then a JSON list of"
        " calls, each with name and arguments, or words.",
    )
    _python_forms: bool = PrivateAttr(default=False)  # runs of format 1 print lists as Python writes them

    def of_format_1(self) -> Self:
        """The template as runs of format 1 render it."""
        copy = self.model_copy()
        copy._python_forms = True
        return copy

    def text(self, value: Any) -> str:
        """A row's value as text. Raises `PythonForm` for a list, a mapping, bytes and None."""
        return str(value) if self._python_forms else text_of(value)

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.inverted and self.cot:
            raise ValueError("a template is `inverted` or `cot`, not both")
        return self

    @field_validator("choices", "tools")
    @classmethod
    def _is_expression(cls, source: Any) -> Any:
        return checked_expression(source)

    @field_validator("instruction", "input", "output")
    @classmethod
    def _compiles(cls, text: str) -> str:
        return compiled_wording(text)

    @cached_property
    def parts(self) -> tuple[Wording, Wording, Wording]:
        """Instruction, input and output, compiled."""
        return Wording(self.instruction), Wording(self.input), Wording(self.output)

    @property
    def names(self) -> frozenset[str]:
        """Names of all variables that the three parts and `tools` use."""
        listed = Expression(self.tools).names if self.tools is not None else frozenset()
        return listed.union(*(part.names for part in self.parts))

    @cached_property
    def choices_expression(self) -> Expression | None:
        """Its own choices as an expression over the row, compiled; None if it has none, or a list."""
        return Expression(self.choices) if isinstance(self.choices, str) else None

    @property
    def choices_names(self) -> frozenset[str]:
        """The row fields that its own choices are made of."""
        return self.choices_expression.names if self.choices_expression is not None else frozenset()

    @property
    def is_whole(self) -> bool:
        """True if `example` makes examples from rows by itself, without the task's answer and choices."""
        return False

    @property
    def has_turns(self) -> bool:
        """True if its examples may be conversations of several turns, or have functions."""
        return self.tools is not None

    @property
    def has_pairs(self) -> bool:
        """True if its examples have a rejected answer too."""
        return False

    @property
    def has_answer(self) -> bool:
        """False if its examples are prompts without answers."""
        return True

    @property
    def optional_names(self) -> frozenset[str]:
        """Those of `names` that a source may lack, or that may be null; empty unless the template `is_whole`."""
        return frozenset()

    def with_tools(self, example: Example, row: Mapping[str, Any]) -> Example:
        """`example` with the functions of `tools`, and its target read as calls of them. Raises `RowError`."""
        if self.tools is None:
            return example
        functions = Expression(self.tools)(row, python_forms=self._python_forms)
        dialogue = worded_dialogue(example.task, (example.instruction, example.input), example.target, functions)
        answer = dialogue.turns[-1].answer
        references = (answer,) if example.references == (example.target,) else example.references
        return replace(example, target=answer, references=references, dialogue=dialogue)

    def example(self, task: str, row: Mapping[str, Any]) -> Example:
        """The example of one row of `task`, for templates that are whole. Raises `RowError`."""
        raise NotImplementedError
