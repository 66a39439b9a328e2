"""Importer of finished instructions, one a row: Alpaca, Dolly, Self-Instruct's seeds, and rendered P3 rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from apprentice.errors import RowError
from apprentice.tasks.schema import Example, Task, Template
from apprentice.tasks.source_spec import SourceSpec

# Format → columns of instruction, input (may be missing or empty) and answer; `a.b` is key `b` of the first item of list `a`.
KINDS: dict[str, tuple[str, str, str]] = {
    "alpaca": ("instruction", "input", "output"),
    "dolly": ("instruction", "context", "response"),
    "self_instruct": ("instruction", "instances.input", "instances.output"),
    "p3": ("inputs_pretokenized", "", "targets_pretokenized"),
}


class RecordTemplate(Template):
    """A template that takes instruction, input and answer from columns of the row."""

    columns: tuple[str, str, str] = Field(description="Those of instruction, input and answer.")

    @property
    def is_whole(self) -> bool:
        return True

    @property
    def names(self) -> frozenset[str]:
        return frozenset(column.partition(".")[0] for column in self.columns if column)

    @property
    def optional_names(self) -> frozenset[str]:
        return frozenset([self.columns[1]]) - {self.columns[0], self.columns[2], ""}

    def example(self, task: str, row: Mapping[str, Any]) -> Example:
        """The example of one row. Raises `RowError` with reason `null` or `empty_answer`."""
        instruction, input_text, answer = (self._value(row, column) for column in self.columns)
        if instruction is None or answer is None:
            raise RowError("null", f"task {task!r}: {self.columns[0 if instruction is None else 2]!r} is null.")
        if not answer:
            raise RowError("empty_answer", f"task {task!r}: {self.columns[2]!r} is empty.")
        return Example(task, self.name, instruction, input_text or "", answer, (), (answer,))

    def _value(self, row: Mapping[str, Any], column: str) -> str | None:
        name, _, inner = column.partition(".")
        value = row.get(name)
        if inner:
            value = value[0].get(inner) if value else None
        return None if value is None else self.text(value).strip()


def record_tasks(entry: Mapping[str, Any]) -> list[Task]:
    """The task for a recipe entry with one of `KINDS` (a file of training rows).

    Optional keys: `test` (a file) and `cluster`.
    """
    kind = next(kind for kind in KINDS if entry.get(kind))
    return [record_task(entry, kind, RecordTemplate(name=kind, instruction="", output="", columns=KINDS[kind]))]


def record_task(entry: Mapping[str, Any], kind: str, template: Template) -> Task:
    """The task over the file that `entry` names under `kind`, with `template` as its only one."""
    file = str(entry[kind])
    files = {"train": file} | ({"test": str(entry["test"])} if entry.get("test") else {})
    name = re.sub(r"[^a-z0-9]+", "_", f"{kind} {Path(file).name.partition('.')[0]}".lower()).strip("_")
    return Task(
        name=name,
        cluster=entry.get("cluster") or name,
        summary=f"{kind} records of {Path(file).name}",
        sources=(SourceSpec(files=files),),
        metrics=("rouge_l",),
        templates=(template,),
        origin=file,
    )
