"""A task as text for a person: what it is, and each wording, rendered on a sample row where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apprentice.errors import RowError
from apprentice.tasks.builtin import rows
from apprentice.tasks.schema import Task, Template


def describe(task: Task) -> str:
    """Name, cluster, sources and every wording of `task`; wordings of built-in tasks are rendered on their first row."""
    names = [name for spec in task.sources if (name := spec.builtin)]
    row = rows(names[0], "train")[0] if names else None
    places = ", ".join(spec.dataset or spec.hub or spec.builtin or "own files" for spec in task.sources)
    head = [
        f"{task.name}  (cluster {task.cluster}, {', '.join(task.metrics)}, licence {task.licence})",
        task.summary,
        f"from {places}",
    ]
    return "\n".join(
        [*head, *(f"\n{number}. {_wording(task, template, row)}" for number, template in enumerate(task.templates, 1))]
    )


def _wording(task: Task, template: Template, row: Mapping[str, Any] | None) -> str:
    texts = (template.instruction, template.input, template.output)
    if row is not None:
        try:
            example = task.render(row, template)
            texts = (example.instruction, example.input, example.target)
        except RowError as error:
            texts = (template.instruction, template.input, f"(cannot be rendered: {error})")
    inverted = "  (inverted)" if template.inverted else ""
    shown = [f"   {text}".replace("\n", "\n   ") for text in texts[:2] if text]
    return "\n".join([f"{template.name}{inverted}", *shown, f"   → {texts[2]}".replace("\n", "\n     ")])
