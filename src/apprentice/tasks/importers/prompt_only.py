"""Importer of prompt files without answers: rows with a `prompt`, a text or messages, which a model answers itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apprentice.errors import RowError
from apprentice.tasks.importers.conversations import ColumnTemplate, split_turns
from apprentice.tasks.importers.preferences import messages_in
from apprentice.tasks.importers.records import record_task
from apprentice.tasks.schema import Example, Task

_SAMPLE = {"prompt": "Which herb grows in the shade?"}


class PromptOnlyTemplate(ColumnTemplate):
    """A prompt with its history and no answer."""

    COLUMNS = frozenset(["prompt", "system"])
    OPTIONAL = frozenset(["system"])

    @property
    def has_answer(self) -> bool:
        return False

    def example(self, task: str, row: Mapping[str, Any]) -> Example:
        """The example of one prompt.

        Raises `RowError` with reason `null`, `unknown_role`, `turns` or `empty_answer` (of an earlier turn).
        """
        if not row.get("prompt"):
            raise RowError("null", f"task {task!r}: the row has no prompt.")
        messages = messages_in(task, row["prompt"], "user", self.text)
        system, turns = split_turns(task, [*messages, ("assistant", "…")], self.text(row.get("system") or "").strip())
        return Example(task, self.name, turns[-1][0], "", "", (), (), turns[:-1], system)


def prompt_only_tasks(entry: Mapping[str, Any]) -> list[Task]:
    """The task for a recipe entry with `prompts` (a file) and, optionally, `cluster`."""
    task = record_task(entry, "prompts", PromptOnlyTemplate(name="prompt", instruction="", output=""))
    return [task.model_copy(update={"sample": _SAMPLE})]
