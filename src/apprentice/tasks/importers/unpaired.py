"""Importer of unpaired preferences: rows with a prompt, one completion, and a label that says whether it is desirable.

    {"prompt": "Name a herb for the shade.", "completion": "Mint.", "label": true}

The columns are TRL's. Prompt and completion are texts or messages, as in preference files; a label is a boolean, 0 or 1.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from apprentice.errors import RowError
from apprentice.tasks.importers.conversations import ColumnTemplate, split_turns
from apprentice.tasks.importers.preferences import messages_in
from apprentice.tasks.importers.records import record_task
from apprentice.tasks.schema import Example, Task

_SAMPLE = {"prompt": "Which herb grows in the shade?", "completion": "Mint does, and chives.", "label": True}
_LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


class UnpairedTemplate(ColumnTemplate):
    """A prompt with one answer and its label."""

    COLUMNS = frozenset(["prompt", "completion", "label", "system"])
    OPTIONAL = frozenset(["system"])

    def example(self, task: str, row: Mapping[str, Any]) -> Example:
        """The example of one answer.

        Raises `RowError` with reason `null`, `bad_label`, `unknown_role`, `turns` or `empty_answer`.
        """
        for column in ("prompt", "completion", "label"):
            if row.get(column) in (None, "", []):
                raise RowError("null", f"task {task!r}: the row has no {column!r}.")
        label = row["label"].strip().lower() if isinstance(row["label"], str) else row["label"]
        if not isinstance(label, Hashable) or label not in _LABELS:
            raise RowError("bad_label", f"task {task!r}: the label {row['label']!r} is neither true nor false.")
        question = messages_in(task, row["prompt"], "user", self.text)
        answer = messages_in(task, row["completion"], "assistant", self.text)
        system, turns = split_turns(task, [*question, *answer], self.text(row.get("system") or "").strip())
        prompt, target = turns[-1]
        return Example(task, self.name, prompt, "", target, (), (), turns[:-1], system, is_desirable=_LABELS[label])


def has_labels(task: Task) -> bool:
    """True if the answers of `task` are labelled desirable or not."""
    return any(isinstance(template, UnpairedTemplate) for template in task.templates)


def unpaired_tasks(entry: Mapping[str, Any]) -> list[Task]:
    """The task for a recipe entry with `unpaired` (a file) and, optionally, `cluster`."""
    task = record_task(entry, "unpaired", UnpairedTemplate(name="unpaired", instruction="", output=""))
    return [task.model_copy(update={"sample": _SAMPLE})]
