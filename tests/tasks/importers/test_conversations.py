"""Conversations as people write them: roles, system texts, what is left out and what is a bad row."""

from __future__ import annotations

from typing import Any

import pytest

from apprentice.errors import RowError
from apprentice.tasks.importers.conversations import conversation_tasks

(TASK,) = conversation_tasks({"conversations": "chats.jsonl"})


def openai(*said: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in said]}


def sharegpt(*said: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in said]}


@pytest.mark.parametrize(
    "row",
    [
        openai(("system", "S"), ("user", "a"), ("assistant", "b "), ("user", "c"), ("assistant", "d")),
        openai(
            ("developer", "S"), ("user", [{"type": "text", "text": "a"}]), ("assistant", "b"), ("user", "c"), ("assistant", "d")
        ),
        sharegpt(("system", "S"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"), ("human", "e")),
        sharegpt(("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d")) | {"system": "S"},
    ],
)
def test_both_ways_of_writing(row: dict[str, Any]) -> None:
    example = TASK.render(row, TASK.templates[0])
    assert (example.system, example.history, example.instruction, example.target) == ("S", (("a", "b"),), "c", "d")
    assert example.has_turns


def test_a_lone_question_is_an_ordinary_example() -> None:
    example = TASK.render(openai(("user", "a"), ("assistant", "b")), TASK.templates[0])
    assert (example.instruction, example.target, example.has_turns) == ("a", "b", False)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (openai(("assistant", "b"), ("user", "a")), "turns"),
        (openai(("user", "a"), ("user", "b"), ("assistant", "c")), "turns"),
        (openai(("user", "a")), "turns"),
        (openai(("system", "a")), "turns"),
        (openai(("user", "a"), ("critic", "b")), "unknown_role"),
        (openai(("user", "a"), ("tool", "b")), "result_without_call"),
        (openai(("user", "a"), ("assistant", None)), "null"),
        (openai(("user", "a"), ("assistant", " ")), "empty_answer"),
        (openai(("user", "a \ufffd"), ("assistant", "b")), "broken_character"),
        ({"messages": []}, "null"),
        ({}, "null"),
    ],
)
def test_bad_rows_have_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as error:
        TASK.render(row, TASK.templates[0])
    assert error.value.reason == reason
