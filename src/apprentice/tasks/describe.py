"""Description of a task as text: its metadata, its sources, and each template, rendered on a sample row where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apprentice.errors import RowError
from apprentice.tasks.builtin import rows
from apprentice.tasks.schema import Task, Template
from apprentice.tasks.source_spec import SourceSpec

UNKNOWN = "unknown"


def describe(task: Task) -> str:
    """Name, cluster, sources and every template of `task`, rendered on its `sample`, or on a built-in task's first row."""
    row = sample_row(task)
    head = [
        f"{task.name}  (cluster {task.cluster}, {', '.join(task.metrics)}, licence {task.licence})",
        *([task.summary] if task.summary else []),
        *(_place(spec) for spec in task.sources),
    ]
    return "\n".join(
        [*head, *(f"\n{number}. {_wording(task, template, row)}" for number, template in enumerate(task.templates, 1))]
    )


def sample_row(task: Task) -> Mapping[str, Any] | None:
    """The row to render templates on: the task's `sample`, or a built-in task's first row; else None."""
    if task.sample is not None:
        return task.sample
    names = [name for spec in task.sources if (name := spec.builtin)]
    return rows(names[0], "train")[0] if names else None


def training_rows(task: Task) -> int | None:
    """Number of training rows, as published or built in; None if unknown."""
    names = [name for spec in task.sources if (name := spec.builtin)]
    return len(rows(names[0], "train")) if names else task.train_rows


def _place(spec: SourceSpec) -> str:
    if spec.builtin:
        return "from built-in rows"
    if spec.dataset:
        return f"from {spec.dataset}/ under data.root"
    if spec.files:
        return f"from {', '.join(dict.fromkeys(spec.files.values()))}"
    splits = ", ".join(
        f"{split} = {name} ({f'{spec.rows[split]:,}' if split in spec.rows else UNKNOWN} rows)"
        for split, name in spec.splits.items()
    )
    known = f"revision {spec.revision or UNKNOWN}" + (f"; as seen in {spec.card}" if spec.card else "")
    return f"from the hub's {spec.hub}{f', {spec.config}' if spec.config else ''}: {splits}; {known}"


def _wording(task: Task, template: Template, row: Mapping[str, Any] | None) -> str:
    texts = (template.instruction, template.input, template.output)
    if row is not None:
        try:
            example = task.render(row, template)
            texts = (example.instruction, example.input, example.target)
        except RowError as error:
            texts = (template.instruction, template.input, f"(cannot be rendered: {error})")
    kind = "  (inverted)" if template.inverted else "  (chain of thought)" if template.cot else ""
    shown = [f"   {text}".replace("\n", "\n   ") for text in texts[:2] if text]
    return "\n".join([f"{template.name}{kind}", *shown, f"   → {texts[2]}".replace("\n", "\n     ")])
