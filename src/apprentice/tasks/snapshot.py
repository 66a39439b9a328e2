"""Snapshot of a run's tasks: the definitions that each entry of `data.tasks` had when the run was made.

The text needs no other file, so a run outlives changes of task files and of the library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apprentice.tasks.definition import definition_of
from apprentice.tasks.importers.conversations import ConversationTemplate
from apprentice.tasks.importers.natural_instructions import InstanceTemplate
from apprentice.tasks.importers.preferences import PreferenceTemplate
from apprentice.tasks.importers.prompt_only import PromptOnlyTemplate
from apprentice.tasks.importers.promptsource import PromptSourceTemplate
from apprentice.tasks.importers.records import KINDS, RecordTemplate
from apprentice.tasks.importers.unpaired import UnpairedTemplate
from apprentice.tasks.registry import IMPORTERS, Entry, Find, find_tasks
from apprentice.tasks.schema import Task, Template

# Key of an entry that names files of another format → the class of its templates.
_TEMPLATES: dict[str, type[Template]] = {
    "promptsource": PromptSourceTemplate,
    "natural_instructions": InstanceTemplate,
    "conversations": ConversationTemplate,
    "preferences": PreferenceTemplate,
    "unpaired": UnpairedTemplate,
    "prompts": PromptOnlyTemplate,
    **dict.fromkeys(KINDS, RecordTemplate),
}


def dump_tasks(entries: Sequence[Entry], folder: Path, find: Find = find_tasks) -> str:
    """The tasks of all `entries` as JSON lines (keys `entry`, `sha256`, `task`). Raises `TaskError` as `find_tasks` does."""
    lines = [
        json.dumps(
            {
                "entry": entry,
                "sha256": definition_of(task),
                "task": task.model_dump(mode="json", exclude_defaults=True, fallback=str),
            },
            ensure_ascii=False,
        )
        for entry in entries
        for task in find(entry, folder)
    ]
    return "".join(f"{line}\n" for line in lines)


class TaskSnapshot:
    """The tasks of a run, read from the text that `dump_tasks` made; none if the text is empty."""

    def __init__(self, text: str) -> None:
        self._of_entry: dict[str, list[Task]] = {}
        for line in text.splitlines():
            record = json.loads(line)
            self._of_entry.setdefault(_key(record["entry"]), []).append(_task(record["entry"], record["task"]))
        self._by_name = {task.name: task for tasks in self._of_entry.values() for task in tasks}

    def find(self, entry: Entry, folder: Path) -> list[Task]:
        """The tasks of `entry` when the run was made, or the kept task of that name; any other entry goes to `find_tasks`."""
        if (kept := self._of_entry.get(_key(entry))) is not None:
            return kept
        return [self._by_name[entry]] if isinstance(entry, str) and entry in self._by_name else find_tasks(entry, folder)

    def find_again(self, entry: Entry, folder: Path) -> list[Task]:
        """The tasks of `entry` for resuming the run: a user's own files as they are now, the library's tasks as they were then.

        So a later version of the library does not change the run, and a change of the user's own files is noticed.
        """
        own = not isinstance(entry, str) or entry.endswith((".yaml", ".yml"))
        return find_tasks(entry, folder) if own else self.find(entry, folder)

    def changed(self, tasks: Sequence[Task]) -> list[str]:
        """Names of those of `tasks` that the run knows under the same name with another definition."""
        known = {name: definition_of(task) for name, task in self._by_name.items()}
        return [task.name for task in tasks if known.get(task.name, definition_of(task)) != definition_of(task)]


def _key(entry: Entry) -> str:
    return json.dumps(entry, sort_keys=True)


def _task(entry: Entry, content: Mapping[str, Any]) -> Task:
    kind = next((kind for kind in IMPORTERS if isinstance(entry, Mapping) and entry.get(kind) is not None), "")
    template = _TEMPLATES.get(kind, Template)
    return Task.model_validate({**content, "templates": [template.model_validate(one) for one in content["templates"]]})
