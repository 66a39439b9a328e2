"""Scaffold of a task file for a user's own table: guesses the purpose of each column and drafts first templates.

Pure functions, from columns and rows to the content of a task file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apprentice.errors import TaskError, did_you_mean
from apprentice.tasks.templates.cells import Cell
from apprentice.tasks.templates.printing import is_text

# Usual names of columns of each kind, the most certain first; compared without case.
INSTRUCTIONS = ("instruction", "prompt", "question", "query", "request", "inputs")
ANSWERS = ("output", "answer", "response", "completion", "reply", "summary", "target", "targets", "translation")
LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "topic", "rating", "stars")
MOST_CHOICES = 100
LISTED = 12  # most choices that a template, or a message, lists
LETTERS = "ABCDEFGHIJ"
SHORT = 5.0  # words; answers of at most this mean length are scored by exact match and token F1, longer ones by ROUGE-L


@dataclass(frozen=True)
class Columns:
    """The purpose of each column: exactly one of `answer` and `label`, an optional `instruction`, any number of inputs.

    `choices` are the columns that hold each row's own choices: one column for each choice, or a single column of lists.
    """

    inputs: tuple[str, ...]
    instruction: str | None = None
    answer: str | None = None
    label: str | None = None
    choices: tuple[str, ...] = ()


class UnclearLabelsError(TaskError):
    """The meaning of labels, or the place of the choices, cannot be guessed.

    `question` asks the user for it; `values` are the labels.
    """

    def __init__(self, message: str, question: str, values: tuple[str, ...]) -> None:
        super().__init__(message)
        self.question = question
        self.values = values


class UnclearColumnError(TaskError):
    """It cannot be guessed which of `columns` is to be learnt."""

    def __init__(self, message: str, columns: tuple[str, ...]) -> None:
        super().__init__(message)
        self.columns = columns


def guess(
    columns: Sequence[str],
    file: str,
    *,
    instruction: str | None = None,
    inputs: Sequence[str] = (),
    answer: str | None = None,
    label: str | None = None,
    choices: Sequence[str] = (),
    unprintable: Collection[str] = (),
) -> Columns:
    """Completes the columns that the user named by the usual names of columns.

    Columns in `unprintable` do not become inputs by themselves. `choices` are taken as columns with each row's choices if all
    of them are names of columns. Raises `TaskError` for a column that is not there, if both answer and label are named, if it
    is unclear which column is to be learnt, and if no other column is left to ask about.
    """
    for named in (instruction, answer, label, *inputs):
        if named is not None and named not in columns:
            raise TaskError(f"{file} has no column {named!r}.{did_you_mean(named, columns)} Its columns are {', '.join(columns)}.")
    if answer is not None and label is not None:
        raise TaskError(f"--answer {answer} and --label {label}: a task has either an answer to write or labels to choose from.")
    if answer is None and label is None:
        answer = _first(columns, ANSWERS)
        label = _first(columns, LABELS) if answer is None else None
    if answer is None and label is None:
        raise UnclearColumnError(
            f"it is not clear which column of {file} is to be learnt; its columns are {', '.join(columns)}."
            " Say --label COLUMN for labels to choose from, or --answer COLUMN for texts to write.",
            tuple(columns),
        )
    if instruction is None and answer is not None:
        instruction = _first([column for column in columns if column not in (answer, *inputs)], INSTRUCTIONS)
    own = tuple(choices) if choices and label is not None and {*choices} <= {*columns} - {label} else ()
    used = {instruction, answer, label, *own, *unprintable}
    input_columns = tuple(inputs) or tuple(column for column in columns if column not in used and not _is_number(column))
    if not input_columns and instruction is None and not own:
        raise TaskError(f"{file} has no column besides {answer or label!r}, so there is nothing to ask about.")
    return Columns(input_columns, instruction, answer, label, own)


def _first(columns: Sequence[str], names: Sequence[str]) -> str | None:
    lower = {column.lower().strip(): column for column in columns}
    return next((lower[name] for name in names if name in lower), None)


def _is_number(column: str) -> bool:
    """Whether the column's name says that it only numbers the rows."""
    return column.lower().strip() in ("id", "idx", "index", "row", "")


def fields_of(columns: Columns) -> dict[str, str]:
    """Field → column, with field names that templates can use: "Review text" becomes `review_text`."""
    fields: dict[str, str] = {}
    for column in filter(None, (columns.instruction, *columns.inputs, *columns.choices, columns.answer, columns.label)):
        if column in fields.values():
            continue
        name = re.sub(r"\W+", "_", column.lower()).strip("_") or "column"
        name = f"column_{name}" if name[0].isdigit() else name
        while name in fields:
            name += "_"
        fields[name] = column
    return fields


def draft(
    name: str,
    columns: Columns,
    rows: Sequence[Mapping[str, Any]],
    files: Mapping[str, str],
    choices: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of a task file over `files` (split → path), from all rows, or enough of them to see every label.

    `choices` are the names of the labels, in the order of their sorted values. Raises `TaskError` for too few or too many
    labels, a wrong number of names, or a column that is no text; `UnclearLabelsError` for labels without meaning, such as
    numbers without names.
    """
    fields = fields_of(columns)
    named = {column: field for field, column in fields.items()}
    renamed = {field: column for field, column in fields.items() if field != column}
    source: dict[str, Any] = {"files": dict(files)} | ({"columns": renamed} if renamed else {})
    content: dict[str, Any] = {"name": name, "cluster": "own", "sources": [source]}
    shown = {column: _printed(column, named[column], rows) for column in filter(None, (columns.instruction, *columns.inputs))}
    input_template = _inputs(columns, shown)
    if columns.label is not None and columns.choices:
        content |= _with_own_choices(columns, named, rows)
        templates = _choosing_own(input_template)
    elif columns.label is not None:
        content |= _with_choices(columns, named[columns.label], rows, choices)
        templates = _choosing(content["choices"], input_template)
    else:
        assert columns.answer is not None
        if choices:
            raise TaskError("--choices names labels, but there is no --label column; leave it out.")
        answer, right, texts = _answer(columns.answer, named[columns.answer], rows)
        short = sum(len(text.split()) for text in texts) <= SHORT * len(texts)
        content |= {"answer": f"{{{{ {answer} }}}}"} | ({"references": right} if right else {})
        content["metrics"] = ["exact_match", "token_f1"] if short else ["rouge_l"]
        templates = _writing(columns, shown, input_template)
    sample = {field: rows[0][column] for field, column in fields.items()}
    return content | {"sample": sample, "templates": templates}


def is_printable(value: Any) -> bool:
    """Whether the value is text, a number, or a list of these."""
    return all(map(is_text, value)) if isinstance(value, list) else is_text(value)


def _printed(column: str, field: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The template expression that prints a column; lists have each item on a line of its own. Raises `TaskError`."""
    values = [row[column] for row in rows]
    if odd := [value for value in values if not is_printable(value)]:
        raise TaskError(_no_text(column, odd[0], "name other columns with --input or --instruction"))
    return f"{field} | join('\\n')" if any(isinstance(value, list) for value in values) else field


def _answer(column: str, field: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str | None, list[str]]:
    """The expression of the answer, the expression of all right answers if there may be several, and the answers as text.

    Raises `TaskError` for a column that is no text.
    """
    values = [row[column] for row in rows]
    if all(isinstance(value, Mapping) and is_printable(value.get("text")) for value in values):  # SQuAD's format of answers
        field, values = f"{field}.text", [value["text"] for value in values]
    if odd := [value for value in values if not is_printable(value)]:
        raise TaskError(_no_text(column, odd[0], "name the column with the text to write with --answer"))
    if not any(isinstance(value, list) for value in values):
        return field, None, list(map(str, values))
    return f"{field}[0]", field, [str(value[0]) for value in values if value]


def _no_text(column: str, value: Any, remedy: str) -> str:
    if isinstance(value, bytes):
        return f"column {column!r} holds bytes, not text, such as {value[:LISTED]!r}; say what they are written in with --encoding."
    keys = f" with the keys {_shown(list(value))}" if isinstance(value, Mapping) else ""
    kind = "mapping" if isinstance(value, Mapping) else type(value).__name__
    return f"column {column!r} holds a {kind}{keys} in each row, which is no text; {remedy}."


def _inputs(columns: Columns, shown: Mapping[str, str]) -> str:
    """The template text that shows the input columns: a single one bare, several with their names before them."""
    if len(columns.inputs) == 1:
        return f"{{{{ {shown[columns.inputs[0]]} }}}}"
    return "\n".join(f"{column.strip().capitalize()}: {{{{ {shown[column]} }}}}" for column in columns.inputs)


def _with_choices(columns: Columns, field: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    labels = _labels(str(columns.label), rows)
    if not 2 <= len(labels) <= MOST_CHOICES:
        raise TaskError(
            f"column {field!r} holds {len(labels)} different values; labels are 2 to {MOST_CHOICES}."
            " Say --answer COLUMN instead if its texts are to be written, not chosen."
        )
    if names and len(names) != len(labels):
        raise TaskError(f"--choices gives {len(names)} names, but column {field!r} holds {len(labels)} values: {_shown(labels)}.")
    if not names and (all(map(_is_number_text, labels)) or suggested_choices(columns, rows)):
        raise _unclear(columns, labels, rows)
    counted = labels == list(range(len(labels))) and not any(isinstance(value, bool) for value in labels)
    return {
        "choices": list(names) or [str(value) for value in labels],
        "label": field if counted else f"{labels!r}.index({field})",
        "metrics": ["accuracy"],
    }


def _labels(column: str, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The distinct values of a column, sorted; numbers, also those that CSV holds as text, come before texts."""
    if odd := [row[column] for row in rows if not is_text(row[column])]:
        raise TaskError(_no_text(column, odd[0], "name the column of labels with --label, or that of texts to write with --answer"))
    labels = {row[column] for row in rows}
    return sorted(labels, key=lambda value: (0, float(value), "") if _is_number_text(value) else (1, 0.0, str(value)))


def _is_number_text(value: Any) -> bool:
    """Whether the value is a number, or a text that spells one."""
    spelt = Cell(value).value if isinstance(value, str) else value
    return isinstance(spelt, int | float) and not isinstance(spelt, bool)


def _unclear(columns: Columns, labels: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> UnclearLabelsError:
    values = tuple(map(str, labels))
    own = suggested_choices(columns, rows)
    fact = f"the labels in column {columns.label!r} are {_shown(labels)}, which say nothing to a model"
    remedy = f"give each a name, in this order, as in --choices {','.join(f'name{value}' for value in values[:3])}"
    remedy += ",…" if len(values) > 3 else ""
    stand = (
        f"; if {_shown(own)} hold{'s' if len(own) == 1 else ''} what a row chooses from, --choices {','.join(own)}" if own else ""
    )
    keep = f"; to learn them as they are, --choices {','.join(values)}" if len(values) <= LISTED else ""
    question = f"The labels in column {columns.label!r} are {_shown(labels)}. Their names in this order, with commas between"
    question += f", or {','.join(own)} if each row's choices stand there" if own else ""
    return UnclearLabelsError(f"{fact}; {remedy}{stand}{keep}.", f"{question} (Enter keeps them as they are)", values)


def suggested_choices(columns: Columns, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Columns that seem to hold each row's choices: several that are numbered or lettered alike, or one of lists.

    Empty unless all labels can be numbers or letters of these choices.
    """
    series: dict[str, list[str]] = {}
    for column in columns.inputs:
        if all(isinstance(row[column], list) and len(row[column]) > 1 for row in rows):
            return (column,) if _places(columns, (column,), rows) is not None else ()
        if match := re.fullmatch(r"(.*?)[ _-]?(\d|[a-jA-J])", column):
            series.setdefault(match[1], []).append(column)
    for column_names in series.values():
        ends = [column[-1].lower() for column in sorted(column_names)]
        if (
            len(column_names) > 1
            and "".join(ends) in ("0123456789"[: len(ends)], "123456789"[: len(ends)], LETTERS[: len(ends)].lower())
            and _places(columns, column_names, rows) is not None
        ):
            return tuple(sorted(column_names))
    return ()


def _places(columns: Columns, own: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Any] | None:
    """The labels of the first choice, the second and so on, such as [1, 2, 3] or ["A", "B", "C"].

    None if the labels are neither numbers nor letters of the choices.
    """
    number = max(len(row[own[0]]) for row in rows) if len(own) == 1 else len(own)
    labels = _labels(str(columns.label), rows)
    kind = type(labels[0])
    for start in (0, 1):
        numbers: list[Any] = [kind(place) for place in range(start, start + number)] if kind in (int, str) else []
        if {*labels} <= {*numbers}:
            return numbers
    for letters in (LETTERS, LETTERS.lower()):
        if {*labels} <= {*letters[:number]}:
            return list(letters[:number])
    return None


def _with_own_choices(columns: Columns, named: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The keys `choices`, `label` and `metrics` of a task whose choices are in each row.

    A label may be the number, the letter or the text of a choice. Raises `TaskError` if it is none of these.
    """
    own, label = columns.choices, named[str(columns.label)]
    lists = [isinstance(row[column], list) for row in rows for column in own]
    if len(own) == 1 and not all(lists):
        raise TaskError(f"--choices {own[0]}: this column holds one text a row; name one column for each choice, or one of lists.")
    if len(own) > 1 and any(lists):
        raise TaskError(
            f"--choices {','.join(own)}: a column of these holds lists; name one column of lists, or one for each choice."
        )
    choices = named[own[0]] if len(own) == 1 else f"[{', '.join(named[column] for column in own)}]"
    places = _places(columns, own, rows)
    by_text = all(row[str(columns.label)] in (row[own[0]] if len(own) == 1 else [row[column] for column in own]) for row in rows)
    if places is None and not by_text:
        raise TaskError(
            f"column {columns.label!r} holds {_shown(_labels(str(columns.label), rows))}, which are neither numbers nor letters nor"
            f" texts of the choices in {_shown(own)}; name another with --label."
        )
    counted = places is not None and places == list(range(len(places)))
    expression = label if counted else f"{choices}.index({label})" if places is None else f"{places!r}.index({label})"
    return {"choices": choices, "label": expression, "metrics": ["accuracy"]}


def _choosing_own(inputs: str) -> list[dict[str, Any]]:
    listed = f"{inputs}\n\n".lstrip() + "- {{ choices | join('\n- ') }}"
    return [
        {"name": "choose", "instruction": "Choose the answer that fits best.", "input": listed},
        {"name": "which", "instruction": "Which of these is right?", "input": listed},
        {"name": "copy", "instruction": "Only one of these is right. Answer with it alone.", "input": listed},
    ]


def _shown(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[:LISTED])) + (", …" if len(values) > LISTED else "")


def _choosing(choices: Sequence[str], inputs: str) -> list[dict[str, Any]]:
    listed = f": {', '.join(choices)}" if len(choices) <= LISTED else ""
    return [
        {"name": "choose", "instruction": f"Choose the label that fits{listed}.", "input": inputs},
        {"name": "which", "instruction": f"Which label does this deserve{listed}?", "input": inputs},
        {"name": "sort", "instruction": f"Sort this under one heading{listed}. Answer with the heading alone.", "input": inputs},
    ]


def _writing(columns: Columns, shown: Mapping[str, str], inputs: str) -> list[dict[str, Any]]:
    if columns.instruction is not None:
        template: dict[str, Any] = {"name": "as_written", "instruction": f"{{{{ {shown[columns.instruction]} }}}}"}
        return [template | ({"input": inputs} if inputs else {})]
    what = str(columns.answer).strip().lower()
    return [
        {"name": "write", "instruction": f"Write the {what} for this.", "input": inputs},
        {"name": "what", "instruction": f"What is the {what}?", "input": inputs},
        {"name": "give", "instruction": f"Read this and give the {what}.", "input": inputs},
    ]
