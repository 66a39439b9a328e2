"""Importer of preference files: rows with a prompt, a chosen answer and a rejected one.

Three formats are read: texts in `prompt`, `chosen` and `rejected`; messages in any of the three, where `chosen` and `rejected`
hold the answer alone or the whole conversation (UltraFeedback); and whole conversations as texts with "Human:" and
"Assistant:" (HH-RLHF).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from apprentice.errors import RowError
from apprentice.tasks.importers.conversations import ColumnTemplate, message_of, split_turns
from apprentice.tasks.importers.records import record_task
from apprentice.tasks.schema import Example, Task
from apprentice.tasks.source_spec import SourceSpec

_SAMPLE = {"prompt": "Which herb grows in the shade?", "chosen": "Mint does, and chives.", "rejected": "Any."}
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_SPOKEN = re.compile(r"\n\n(Human|Assistant):")

Messages = list[tuple[str, str]]  # (role, text) of each message


class PreferenceTemplate(ColumnTemplate):
    """A prompt with both answers. As choices for ranking, the two stand in alphabetical order."""

    COLUMNS = frozenset(["prompt", "chosen", "rejected", "system"])
    OPTIONAL = frozenset(["prompt", "system"])

    @property
    def has_pairs(self) -> bool:
        return True

    def example(self, task: str, row: Mapping[str, Any]) -> Example:
        """The example of one pair.

        Raises `RowError` with reason `null`, `unknown_role`, `turns`, `prompts_differ`, `empty_answer` or `equal_answers`.
        """
        for column in ("chosen", "rejected"):
            if not row.get(column):
                raise RowError("null", f"task {task!r}: the row has no {column!r} answer.")
        question = messages_in(task, row.get("prompt") or [], "user", self.text)
        (better, before), (worse, other) = (_answer(task, row[column], question, self.text) for column in ("chosen", "rejected"))
        if before != other:
            raise RowError("prompts_differ", f"task {task!r}: the two answers do not follow the same conversation.")
        system, turns = split_turns(task, [*before, ("assistant", better)], self.text(row.get("system") or "").strip())
        if not worse:
            raise RowError("empty_answer", f"task {task!r}: the rejected answer is empty.")
        if better == worse:
            raise RowError("equal_answers", f"task {task!r}: both answers of the pair are the same, so neither is better.")
        choices = (better, worse) if better < worse else (worse, better)
        return Example(task, self.name, turns[-1][0], "", better, choices, (better,), turns[:-1], system, worse)


def messages_in(task: str, value: Any, role: str, text: Callable[[Any], str]) -> Messages:
    """The messages in a column: a list of messages, a conversation written as one text, or one text of `role`.

    Raises `RowError` with reason `turns` for anything else.
    """
    if not isinstance(value, str):
        if not (isinstance(value, list) and all(isinstance(message, Mapping) for message in value)):
            raise RowError("turns", f"task {task!r}: {str(value)[:80]!r} is neither a text nor a list of messages.")
        return [message_of(task, message, text) for message in value]
    parts = _SPOKEN.split(f"\n\n{value.lstrip()}") if _SPOKEN.match(f"\n\n{value.lstrip()}") else []
    if not parts:
        return [(role, value.strip())]
    messages = [(_SPEAKERS[speaker], spoken.strip()) for speaker, spoken in zip(parts[1::2], parts[2::2], strict=True)]
    return messages[:-1] if role == "user" and messages[-1] == ("assistant", "") else messages  # the prompt ends with "Assistant:"


def _answer(task: str, value: Any, question: Messages, text: Callable[[Any], str]) -> tuple[str, Messages]:
    """The answer, and the messages before it: those in the column itself, or else `question`.

    Raises `RowError` with reason `turns` if the column does not end with an answer.
    """
    messages = messages_in(task, value, "assistant", text)
    if not messages or messages[-1][0] != "assistant":
        raise RowError("turns", f"task {task!r}: an answer of the pair does not end with what the assistant says.")
    return messages[-1][1], messages[:-1] or question


def preference_tasks(entry: Mapping[str, Any]) -> list[Task]:
    """The task for a recipe entry with `preferences`: a file, or with `splits` a dataset.

    Optional keys: `test` (a file) and `cluster`.
    """
    task = record_task(entry, "preferences", PreferenceTemplate(name="preference", instruction="", output=""))
    changes: dict[str, Any] = {"metrics": ("accuracy", "length_bias"), "sample": _SAMPLE}
    if splits := entry.get("splits"):
        name = str(entry["preferences"])
        changes["sources"] = (SourceSpec(dataset=name.rsplit("/", 1)[-1], splits=splits), SourceSpec(hub=name, splits=splits))
    return [task.model_copy(update=changes)]
