"""A task: one dataset with everything needed to learn and score it, declared in one YAML file.

    name: sst2
    cluster: sentiment
    summary: Does a sentence from a film review praise or condemn?
    licence: unknown
    sources:                              # the first one that can be reached is used
      - dataset: sst2                     # <data.root>/sst2/<split>.parquet
        splits: {train: train, test: test}
      - hub: stanfordnlp/sst2             # Hugging Face hub id
        splits: {train: train, test: validation}
        columns: {sentence: sentence}     # our field: the source's column; others keep their name
        rows: {train: 67349, test: 872}   # as the card says; left out when nobody could see it
        card: dataset card of nyu-mll/glue   # where splits, columns and rows were looked up
    choices: [negative, positive]         # a list, or an expression over the row such as `endings`
    label: label                          # expression: index of the right choice
    keep: label >= 0                      # expression: which rows count; left out where all do
    metrics: [accuracy]
    sample: {sentence: a film to treasure, label: 1}   # one invented row, on which `apprentice tasks sst2` shows the wordings
    templates:
      - name: praise_or_not
        instruction: Does the reviewer like the film? Answer "positive" or "negative".
        input: "{{ sentence }}"
        output: "{{ answer }}"            # the default
      - name: write_a_review              # inverted: the answer is given, the input is asked for
        inverted: true
        instruction: Write one {{ answer }} sentence about a film.
        output: "{{ sentence }}"

A task without `choices` gives `answer` (a template, such as `{{ answers.text[0] }}`) and is scored by generation;
`references` (an expression that gives a list) names all answers that count as right. Expressions, and the task's
`answer`, see the row as it is. Templates also see `answer` and, in a task with choices, `choices` and `label`; these hide
fields of the row with the same names. A template may have `choices` of its own, a list or an expression, in the order of the
task's; a list such as [A, B, C, D] is cut to the number of a row's choices. `input` may be left out. A template with `cot: true`
(chain of thought) asks for the reasoning and then the answer, and its `output` gives both; it is trained on, not scored, unless
the task has no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Self

import jinja2
from pydantic import Field, SerializeAsAny, field_validator, model_validator

from apprentice.errors import RowError, TaskError, did_you_mean
from apprentice.tasks.source_spec import SourceSpec, TaskFileModel
from apprentice.tasks.template import REPLACEMENT_CHARACTER, Example, Template, checked_expression, compiled_wording
from apprentice.tasks.templates.cells import Cell
from apprentice.tasks.templates.expressions import Expression, Wording
from apprentice.tasks.templates.line_numbers import template_lines
from apprentice.tasks.templates.printing import PythonForm, unknown_label

__all__ = ["Example", "Metric", "Task", "Template", "missing_fields"]

Metric = Literal[
    "accuracy",
    "exact_match",
    "token_f1",
    "rouge_1",
    "rouge_2",
    "rouge_l",
    "bleu",
    "chrf",
    "matthews",
    "label_distribution",
    "length_bias",
    "ni_rouge_l",
    "ni_exact_match",
    "tool_calls",
]


class Task(TaskFileModel):
    """One dataset with its sources, templates, choices and metrics."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$")
    cluster: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$")
    summary: str = ""
    licence: str = "unknown"
    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    choices: tuple[str, ...] | str | None = None
    label: str | None = None
    answer: str | None = None
    references: str | None = None
    keep: str | None = Field(None, description="Expression over the row; rows where it is false are left out, and counted.")
    metrics: tuple[Metric, ...] = Field(min_length=1)
    sample: dict[str, Any] | None = Field(None, description="One invented row, in the task's fields, to show the wordings on.")
    templates: tuple[SerializeAsAny[Template], ...] = Field(min_length=1)
    origin: str = Field("", description="The file that it was read from.")

    def of_format(self, number: int) -> Task:
        """The task as a run of this format renders it.

        In format 1, lists are printed as Python writes them, and `references` see the rendered answer as the field `answer`.
        """
        if number >= 2:
            return self
        return self.model_copy(update={"templates": tuple(template.of_format_1() for template in self.templates)})

    @field_validator("choices", "label", "references", "keep")
    @classmethod
    def _is_expression(cls, source: Any) -> Any:
        return checked_expression(source)

    @field_validator("answer")
    @classmethod
    def _is_wording(cls, source: str | None) -> str | None:
        return source and compiled_wording(source)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.choices is None) == (self.answer is None) and not self.is_whole:
            raise ValueError("a task has either `choices` with a `label`, or an `answer`")
        if (self.choices is None) != (self.label is None):
            raise ValueError("`choices` and `label` come together")
        names = [template.name for template in self.templates]
        if doubles := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two templates are called {doubles[0]!r}")
        for template in self.templates:
            if template.choices is not None and self.choices is None:
                raise ValueError(
                    f"template {template.name!r} has `choices`, and the task has none; remove them, or give it a `label`"
                )
            are_lists = isinstance(template.choices, tuple) and isinstance(self.choices, tuple)
            if are_lists and len(template.choices or ()) != len(self.choices or ()):
                raise ValueError(f"template {template.name!r} must have as many choices as the task")
        return self

    @property
    def train_rows(self) -> int | None:
        """Published number of training rows, of the first source that states one; None if unknown."""
        return next((spec.rows["train"] for spec in self.sources if "train" in spec.rows), None)

    @property
    def is_ranked(self) -> bool:
        """True if the answer is chosen by ranking choices, false if it is generated."""
        return self.choices is not None or (self.is_whole and self.metrics[0] == "accuracy")

    @cached_property
    def is_whole(self) -> bool:
        """True if all its templates make their examples by themselves."""
        return all(template.is_whole for template in self.templates)

    @cached_property
    def has_pairs(self) -> bool:
        """True if every example has a chosen and a rejected answer."""
        return all(template.has_pairs for template in self.templates)

    @cached_property
    def has_answers(self) -> bool:
        """False if its examples are prompts without answers."""
        return any(template.has_answer for template in self.templates)

    @cached_property
    def template_by_name(self) -> dict[str, Template]:
        return {template.name: template for template in self.templates}

    @cached_property
    def scored_templates(self) -> tuple[Template, ...]:
        """The templates that evaluation uses: those that ask for the answer alone, or, without any, the chain-of-thought ones."""
        return tuple(template for template in self.templates if not template.inverted and not template.cot) or self.cot_templates

    @cached_property
    def inverted_templates(self) -> tuple[Template, ...]:
        """The templates that give the answer and ask for the input."""
        return tuple(template for template in self.templates if template.inverted)

    @cached_property
    def cot_templates(self) -> tuple[Template, ...]:
        """The templates that ask for the reasoning and then the answer."""
        return tuple(template for template in self.templates if template.cot)

    @cached_property
    def fields(self) -> frozenset[str]:
        """The row fields that its templates and expressions use."""
        worded = frozenset().union(*(template.names for template in self.templates)) - self.given_names
        chosen = frozenset().union(*(template.choices_names for template in self.templates))
        return worded.union(chosen, *(part.names for part in self._expressions.values()))

    @cached_property
    def optional_fields(self) -> frozenset[str]:
        """Those of `fields` that a row may lack."""
        return frozenset().union(*(template.optional_names for template in self.templates))

    @cached_property
    def _counting(self) -> dict[str, frozenset[str]]:
        """`label` and `keep` → the fields whose CSV cells they see as numbers and truth values.

        An expression that quotes such a text itself, as in `['1', '2'].index(stars)`, sees text.
        """
        parts = {place: part for place in ("label", "keep") if isinstance(part := self._expressions.get(place), Expression)}
        return {place: part.names for place, part in parts.items() if not any(Cell(text).spells for text in part.texts)}

    @cached_property
    def counted_fields(self) -> frozenset[str]:
        """Those of `fields` whose CSV cells some expression sees as numbers or truth values."""
        return frozenset().union(*self._counting.values())

    @property
    def given_names(self) -> frozenset[str]:
        """Names that templates see besides the row's fields."""
        if self.is_whole:
            return frozenset()
        return frozenset(["choices", "label", "answer"] if self.choices is not None else ["answer"])

    @cached_property
    def _expressions(self) -> dict[str, Wording | Expression]:
        sources = {"choices": self.choices, "label": self.label, "references": self.references, "keep": self.keep}
        compiled: dict[str, Wording | Expression] = {
            place: Expression(source) for place, source in sources.items() if isinstance(source, str)
        }
        return compiled | ({} if self.answer is None else {"answer": Wording(self.answer)})

    def name_of(self, template: Template) -> str:
        """File, line, task and template for a message, as far as they are known."""
        line = template_lines(self.origin).get(template.name) if self.origin else None
        return f"{f'{self.origin}:{line}: ' if line else ''}task {self.name!r}, template {template.name!r}"

    def render(self, row: Mapping[str, Any], template: Template | str) -> Example:
        """The example that `template`, or the one of this name, makes of `row` (field → value).

        Raises `TaskError` for an unknown name, and `RowError` with reason `missing`, `null`, `unknown_label`, `empty_answer`,
        `broken_character`, `python_form` or `template`, and with reason `skipped` if `keep` is false for the row or a whole
        template does not apply to it.
        """
        if isinstance(template, str):
            template = self._named(template)
        for field in () if self.is_whole else self.fields:
            if row.get(field) is None:
                reason = "null" if field in row else "missing"
                raise RowError(reason, f"task {self.name!r}: field {field!r} is {reason}.")
        try:
            return self._render(row, template)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            message = f"{self.name_of(template)}: {error}"
            raise RowError("python_form" if isinstance(error, PythonForm) else "template", message) from error

    def _named(self, name: str) -> Template:
        if name not in self.template_by_name:
            near = did_you_mean(name, self.template_by_name)
            known = ", ".join(self.template_by_name)
            raise TaskError(f"task {self.name!r} has no template {name!r}.{near} It has {known}.")
        return self.template_by_name[name]

    def _render(self, row: Mapping[str, Any], template: Template) -> Example:
        if template.is_whole:
            example = template.example(self.name, row)
            texts = (
                example.instruction,
                example.input,
                example.target,
                example.rejected,
                example.history,
                example.system,
                example.dialogue,
            )
            if any(REPLACEMENT_CHARACTER in str(text) for text in texts):
                raise RowError("broken_character", f"task {self.name!r}: the row holds U+FFFD.")
            return example
        values = dict(row)
        if "keep" in self._expressions and not self._expressions["keep"](self._counted("keep", values), python_forms=True):
            raise RowError("skipped", f"task {self.name!r}: the row is left out, since {self.keep!r} is false of it.")
        choices = self.choices_for(values, template)
        references: tuple[str, ...] = ()
        if choices:
            label = self._label(values, choices)
            values |= {"choices": choices, "label": label, "answer": choices[label]}
        else:
            values["answer"] = self._expressions["answer"](values, python_forms=template._python_forms)
            if "references" in self._expressions:
                old = template._python_forms
                right = self._expressions["references"](values if old else row, python_forms=old)
                references = tuple(template.text(text).strip() for text in right)
        instruction, input_text, output = (part(values, python_forms=template._python_forms) for part in template.parts)
        if not output:
            raise RowError("empty_answer", f"task {self.name!r}, template {template.name!r}: the answer is empty.")
        if REPLACEMENT_CHARACTER in f"{instruction}{input_text}{output}":
            raise RowError("broken_character", f"task {self.name!r}: the row holds U+FFFD.")
        if template.inverted or template.cot or not choices:
            example = Example(self.name, template.name, instruction, input_text, output, (), references or (output,))
            return template.with_tools(example, values)
        return Example(self.name, template.name, instruction, input_text, output, choices, (output,))

    def choices_for(self, row: Mapping[str, Any], template: Template) -> tuple[str, ...]:
        """The choices that `template` offers for `row`: its own, or else the task's; empty for a task without choices.

        Raises `ValueError` if its own are fewer than the task's, or an expression that gives more, and what expressions raise.
        """
        if self.choices is None:
            return ()
        python_forms = template._python_forms

        def listed(expression: Wording | Expression) -> tuple[str, ...]:
            return tuple(template.text(choice).strip() for choice in expression(row, python_forms=python_forms))

        choices = self.choices if isinstance(self.choices, tuple) else listed(self._expressions["choices"])
        if template.choices is None:
            return choices
        expression = template.choices_expression
        own = listed(expression) if expression is not None else tuple(template.choices)[: len(choices)]
        if len(own) != len(choices):
            raise ValueError(f"it has {len(own)} choices of its own, and the row has {len(choices)}")
        return own

    def _label(self, values: Mapping[str, Any], choices: Sequence[str]) -> int:
        counted = self._counted("label", values)
        if blank := [name for name in self._expressions["label"].names if counted.get(name, "") is None]:
            raise RowError("null", f"task {self.name!r}: field {blank[0]!r} is {str(values[blank[0]])!r}, which is no value.")
        label = self._expressions["label"](counted, python_forms=True)
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
            raise RowError("unknown_label", f"task {self.name!r}: {unknown_label(label, choices)}")
        return label

    def _counted(self, place: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row as the expression `label` or `keep` sees it, with CSV cells as the numbers and truth values they spell."""
        names = self._counting.get(place, frozenset())
        cells = {name: cell.value for name in names if isinstance(cell := values.get(name), Cell)}
        return {**values, **cells} if cells else values


def missing_fields(task: Task, spec: SourceSpec, available: Sequence[str]) -> list[tuple[str, str]]:
    """(template name or `task`, field) for every required field that a source with the columns `available` lacks."""
    offered = {field for field in task.fields if spec.columns.get(field, field) in available}
    worded = [(template.name, template.names - task.given_names | template.choices_names) for template in task.templates]
    named = [*worded, *(("task", part.names) for part in task._expressions.values())]
    return [(place, field) for place, names in named for field in sorted(names - offered - task.optional_fields)]
