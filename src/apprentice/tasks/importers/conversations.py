"""Importer of conversation files: ShareGPT's `conversations` and OpenAI's `messages`, trained on every turn of the assistant.

Conversations with functions, and xLAM's records, are read by `dialogue_rows`.

    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning."}]}
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good morning."}], "system": "Be kind."}

A conversation is an optional system text and then alternating questions and answers; a last question without an answer is
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from apprentice.errors import RowError
from apprentice.tasks.importers.dialogue_rows import ROLES, read_dialogue
from apprentice.tasks.importers.records import record_task
from apprentice.tasks.schema import Example, Task, Template


class ColumnTemplate(Template):
    """A template that takes its example from `COLUMNS` of a row as they are; a row may lack those in `OPTIONAL`."""

    COLUMNS: ClassVar[frozenset[str]]
    OPTIONAL: ClassVar[frozenset[str]]

    @property
    def is_whole(self) -> bool:
        return True

    @property
    def has_turns(self) -> bool:
        return True

    @property
    def names(self) -> frozenset[str]:
        return self.COLUMNS

    @property
    def optional_names(self) -> frozenset[str]:
        return self.OPTIONAL


class ConversationTemplate(ColumnTemplate):
    """A conversation's last question and answer are the example; the earlier turns are its history."""

    # A row has messages, conversations, or query and answers.
    COLUMNS = frozenset(["messages", "conversations", "system", "tools", "functions", "query", "answers"])
    OPTIONAL = COLUMNS

    def example(self, task: str, row: Mapping[str, Any]) -> Example:
        """The example of one conversation.

        Raises `RowError` with reason `null`, `unknown_role`, `turns` or `empty_answer`, and as `read_dialogue` does.
        """
        if (dialogue := read_dialogue(task, row)) is not None:
            questions = [turn.content for turn in dialogue.turns if turn.role == "user"]
            answer = dialogue.turns[-1].answer
            return Example(task, self.name, questions[-1], "", answer, (), (answer,), dialogue=dialogue)
        messages = row.get("messages") or row.get("conversations")
        if not messages:
            raise RowError("null", f"task {task!r}: the row has neither `messages` nor `conversations`.")
        messages = [message_of(task, message, self.text) for message in messages]
        if messages[-1][0] == "user":
            messages.pop()
        system, turns = split_turns(task, messages, self.text(row.get("system") or "").strip())
        question, answer = turns[-1]
        return Example(task, self.name, question, "", answer, (), (answer,), turns[:-1], system)


def split_turns(task: str, messages: Sequence[tuple[str, str]], system: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Splits (role, text) messages into the system text and pairs of question and answer.

    The system text is that of a first message with the role `system`, or else `system`. Raises `RowError` with reason `turns`
    or `empty_answer`.
    """
    if messages and messages[0][0] == "system":
        system, messages = messages[0][1] or system, messages[1:]
    if not messages or [role for role, _ in messages] != ["user", "assistant"] * (len(messages) // 2):
        raise RowError("turns", f"task {task!r}: the turns are not questions and answers by turns, beginning with a question.")
    if not all(text for role, text in messages if role == "assistant"):
        raise RowError("empty_answer", f"task {task!r}: an answer is empty.")
    return system, tuple((question, answer) for (_, question), (_, answer) in zip(messages[::2], messages[1::2], strict=True))


def message_of(task: str, message: Mapping[str, Any], text: Callable[[Any], str]) -> tuple[str, str]:
    """(role, text) of one message of either format; `text` turns the content into a string.

    Raises `RowError` with reason `unknown_role` or `null`.
    """
    role_name = message.get("role") or message.get("from")
    role = ROLES.get(str(role_name).lower())
    if role is None:
        raise RowError("unknown_role", f"task {task!r}: role {role_name!r} is none of {', '.join(ROLES)}.")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    if isinstance(content, list):
        content = "\n".join(text(part["text"]) for part in content if part.get("text"))
    if content is None:
        raise RowError("null", f"task {task!r}: a message has no text.")
    return role, text(content).strip()


def conversation_tasks(entry: Mapping[str, Any]) -> list[Task]:
    """The task for a recipe entry with `conversations` (a file) and, optionally, `test` (a file) and `cluster`."""
    return [record_task(entry, "conversations", ConversationTemplate(name="conversation", instruction="", output=""))]
