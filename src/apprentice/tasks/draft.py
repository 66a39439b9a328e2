"""A first task file for somebody's own table: which columns hold instruction, input, answer or label, and wordings to begin with.

Pure: columns and rows in, the content of a task file out. Knows nothing of files, nor of how the rows are split.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apprentice.errors import TaskError, did_you_mean

# Names that columns of each kind often have, the surest first; compared without case.
INSTRUCTIONS = ("instruction", "prompt", "question", "query", "request", "inputs")
ANSWERS = ("output", "answer", "response", "completion", "reply", "summary", "target", "targets", "translation")
LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "topic", "rating", "stars")
MOST_CHOICES = 100
LISTED = 12  # choices that a wording can list
SHORT = 5.0  # words: answers of up to this mean length are compared whole, longer ones by what they share


@dataclass(frozen=True)
class Columns:
    """What each column is for: exactly one of `answer` and `label`, an `instruction` perhaps, and any number of inputs."""

    inputs: tuple[str, ...]
    instruction: str | None = None
    answer: str | None = None
    label: str | None = None


def guess(
    columns: Sequence[str],
    file: str,
    *,
    instruction: str | None = None,
    inputs: Sequence[str] = (),
    answer: str | None = None,
    label: str | None = None,
) -> Columns:
    """What the user said, completed by the names of columns. Raises `TaskError` for one that is not there, or if it is unclear."""
    for named in (instruction, answer, label, *inputs):
        if named is not None and named not in columns:
            raise TaskError(f"{file} has no column {named!r}.{did_you_mean(named, columns)} Its columns are {', '.join(columns)}.")
    if answer is not None and label is not None:
        raise TaskError(f"--answer {answer} and --label {label}: a task has either an answer to write or labels to choose from.")
    if answer is None and label is None:
        answer = _first(columns, ANSWERS)
        label = _first(columns, LABELS) if answer is None else None
    if answer is None and label is None:
        raise TaskError(
            f"it is not clear which column of {file} is to be learnt; its columns are {', '.join(columns)}."
            " Say --label COLUMN for labels to choose from, or --answer COLUMN for texts to write."
        )
    if instruction is None and answer is not None:
        instruction = _first([column for column in columns if column not in (answer, *inputs)], INSTRUCTIONS)
    used = {instruction, answer, label}
    given = tuple(inputs) or tuple(column for column in columns if column not in used and not _is_number(column))
    if not given and instruction is None:
        raise TaskError(f"{file} has no column besides {answer or label!r}, so there is nothing to ask about.")
    return Columns(given, instruction, answer, label)


def _first(columns: Sequence[str], names: Sequence[str]) -> str | None:
    lower = {column.lower().strip(): column for column in columns}
    return next((lower[name] for name in names if name in lower), None)


def _is_number(column: str) -> bool:
    """Whether the column only counts rows."""
    return column.lower().strip() in ("id", "idx", "index", "row", "")


def fields_of(columns: Columns) -> dict[str, str]:
    """Field → column: names that templates can say. "Review text" becomes `review_text`."""
    fields: dict[str, str] = {}
    for column in filter(None, (columns.instruction, *columns.inputs, columns.answer, columns.label)):
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
    """The content of a task file over `files` (split → path); `rows` are all rows, or enough of them to see every label.

    `choices` are the names of the labels in the order of their sorted values. Raises `TaskError` where there are too many labels or
    too few, or not as many names.
    """
    fields = fields_of(columns)
    named = {column: field for field, column in fields.items()}
    renamed = {field: column for field, column in fields.items() if field != column}
    source: dict[str, Any] = {"files": dict(files)} | ({"columns": renamed} if renamed else {})
    content: dict[str, Any] = {"name": name, "cluster": "own", "sources": [source]}
    given = _inputs(columns, named)
    if columns.label is not None:
        content |= _with_choices(named[columns.label], [row[columns.label] for row in rows], choices)
        templates = _choosing(content["choices"], given)
    else:
        assert columns.answer is not None
        if choices:
            raise TaskError("--choices names labels, but there is no --label column; leave it out.")
        said = [str(row[columns.answer]).split() for row in rows]
        short = sum(map(len, said)) <= SHORT * len(said)
        content |= {
            "answer": f"{{{{ {named[columns.answer]} }}}}",
            "metrics": ["exact_match", "token_f1"] if short else ["rouge_l"],
        }
        templates = _writing(columns, named, given)
    sample = {field: rows[0][column] for field, column in fields.items()}
    return content | {"sample": sample, "templates": templates}


def _inputs(columns: Columns, named: Mapping[str, str]) -> str:
    """The text that shows the input columns: the only one bare, several with their names before them."""
    if len(columns.inputs) == 1:
        return f"{{{{ {named[columns.inputs[0]]} }}}}"
    return "\n".join(f"{column.strip().capitalize()}: {{{{ {named[column]} }}}}" for column in columns.inputs)


def _with_choices(field: str, values: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    found = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    if not 2 <= len(found) <= MOST_CHOICES:
        raise TaskError(
            f"column {field!r} holds {len(found)} different values; labels are 2 to {MOST_CHOICES}."
            " Say --answer COLUMN instead if its texts are to be written, not chosen."
        )
    if names and len(names) != len(found):
        raise TaskError(f"--choices gives {len(names)} names, but column {field!r} holds {len(found)} values: {_shown(found)}.")
    counted = found == list(range(len(found))) and not any(isinstance(value, bool) for value in found)
    return {
        "choices": list(names) or [str(value) for value in found],
        "label": field if counted else f"{found!r}.index({field})",
        "metrics": ["accuracy"],
    }


def _shown(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[:LISTED])) + (", …" if len(values) > LISTED else "")


def _choosing(choices: Sequence[str], given: str) -> list[dict[str, Any]]:
    listed = f": {', '.join(choices)}" if len(choices) <= LISTED else ""
    return [
        {"name": "choose", "instruction": f"Choose the label that fits{listed}.", "input": given},
        {"name": "which", "instruction": f"Which label does this deserve{listed}?", "input": given},
        {"name": "sort", "instruction": f"Sort this under one heading{listed}. Answer with the heading alone.", "input": given},
    ]


def _writing(columns: Columns, named: Mapping[str, str], given: str) -> list[dict[str, Any]]:
    if columns.instruction is not None:
        asked: dict[str, Any] = {"name": "as_written", "instruction": f"{{{{ {named[columns.instruction]} }}}}"}
        return [asked | ({"input": given} if given else {})]
    what = str(columns.answer).strip().lower()
    return [
        {"name": "write", "instruction": f"Write the {what} for this.", "input": given},
        {"name": "what", "instruction": f"What is the {what}?", "input": given},
        {"name": "give", "instruction": f"Read this and give the {what}.", "input": given},
    ]
