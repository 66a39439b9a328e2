"""Records with functions: OpenAI's, ShareGPT's, Hermes' and xLAM's become one form; broken ones are refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from apprentice.errors import RowError
from apprentice.tasks.dialogue import Dialogue
from apprentice.tasks.importers.conversations import ConversationTemplate
from apprentice.tasks.importers.dialogue_rows import read_dialogue
from apprentice.tasks.importers.schema_check import fault_in

PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string", "enum": ["x", "y"]}},
    "required": ["a"],
}
FUNCTION = {"name": "f", "description": "F.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]
ARGUMENTS = {"a": 1, "b": "x"}
OPENAI = {
    "messages": [
        {"role": "user", "content": "Go.", "tool_calls": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1, "b": "x"}'}}],
        },
        {"role": "tool", "content": "ok", "tool_call_id": "1"},
        {"role": "assistant", "content": "Done."},
    ],
    "tools": TOOLS,
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Go."},
        {"from": "function_call", "value": json.dumps({"name": "f", "arguments": ARGUMENTS})},
        {"from": "observation", "value": "ok"},
        {"from": "gpt", "value": "Done."},
    ],
    "tools": json.dumps([FUNCTION]),
}
HERMES = {
    "conversations": [
        {"from": "system", "value": f"You call functions. <tools> {json.dumps(TOOLS)} </tools> Go on."},
        {"from": "human", "value": "Go."},
        {"from": "gpt", "value": "<tool_call>\n{'arguments': {'a': 1, 'b': 'x'}, 'name': 'f'}\n</tool_call>"},
        {"from": "tool", "value": "<tool_response>\nok\n</tool_response>"},
        {"from": "gpt", "value": "Done."},
    ]
}
XLAM = {
    "query": "Go.",
    "tools": json.dumps(
        [
            {
                "name": "f",
                "description": "F.",
                "parameters": {"a": {"description": "A.", "type": "int"}, "b": {"type": "str, optional", "default": "x"}},
            }
        ]
    ),
    "answers": json.dumps([{"name": "f", "arguments": ARGUMENTS}, {"name": "f", "arguments": {"a": 2}}]),
}


def read(row: dict[str, Any]) -> Dialogue:
    dialogue = read_dialogue("t", row)
    assert dialogue is not None
    return dialogue


@pytest.mark.parametrize("row", [OPENAI, SHAREGPT, HERMES])
def test_three_forms_are_one(row: dict[str, Any]) -> None:
    dialogue = read(row)
    assert [(turn.role, turn.content) for turn in dialogue.turns] == [
        ("user", "Go."),
        ("assistant", ""),
        ("tool", "ok"),
        ("assistant", "Done."),
    ]
    assert [call.as_dict() for call in dialogue.turns[1].calls] == [{"name": "f", "arguments": ARGUMENTS}]
    assert [json.loads(tool) for tool in dialogue.tools] == TOOLS


def test_xlam_types_become_json_schema() -> None:
    dialogue = read(XLAM)
    assert [turn.role for turn in dialogue.turns] == ["user", "assistant"]
    assert len(dialogue.turns[1].calls) == 2
    parameters = json.loads(dialogue.tools[0])["function"]["parameters"]
    assert parameters["required"] == ["a"]
    assert {name: about["type"] for name, about in parameters["properties"].items()} == {"a": "integer", "b": "string"}


def test_the_example_is_scored_by_its_last_turn() -> None:
    example = ConversationTemplate(name="c", instruction="", output="").example("t", XLAM)
    assert (example.instruction, example.has_turns) == ("Go.", True)
    assert json.loads(example.target)[0] == {"name": "f", "arguments": ARGUMENTS}


def test_a_plain_conversation_is_none_of_these() -> None:
    plain = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<tool_call>"}], "tools": None}
    assert read_dialogue("t", plain) is None


def test_other_columns_of_a_plain_conversation_are_not_read_as_calls() -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning."}]
    assert read_dialogue("t", {"messages": messages, "query": "Hello", "answers": "Good morning."}) is None


def test_properties_that_are_no_mapping_do_not_restrict() -> None:
    assert fault_in({"a": 1}, {"type": "object", "properties": ["a"]}) is None


def test_keys_that_a_table_filled_with_nulls_are_left_out() -> None:
    messages = [dict(message, reasoning_content=None) for message in OPENAI["messages"]]
    filled = [
        {
            "type": "function",
            "function": FUNCTION | {"parameters": PARAMETERS | {"properties": PARAMETERS["properties"] | {"z": None}}},
        }
    ]  # type: ignore[operator]
    assert read({"messages": messages, "tools": filled}) == read(OPENAI)


def broken(**changes: Any) -> dict[str, Any]:
    call = {"name": "f", "arguments": json.dumps(ARGUMENTS)} | changes
    user, _, result, answer = OPENAI["messages"]
    return {"messages": [user, {"role": "assistant", "tool_calls": [{"function": call}]}, result, answer], "tools": TOOLS}


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        (
            broken(arguments='{"a": "1"}'),
            "call_breaks_schema",
            "a call of 'f' breaks its own schema: 'a' is '1', which is no integer",
        ),
        (broken(arguments='{"a": true}'), "call_breaks_schema", "'a' is True, which is no integer"),
        (broken(arguments='{"b": "x"}'), "call_breaks_schema", "'a' is missing"),
        (broken(arguments='{"a": 1, "b": "z"}'), "call_breaks_schema", "none of 'x', 'y'"),
        (broken(arguments='{"a": 1, "c": 1}'), "call_breaks_schema", "'c' is no argument"),
        (broken(name="g"), "call_breaks_schema", "'g' is called, which `tools` does not list"),
        (
            {"messages": [OPENAI["messages"][0], OPENAI["messages"][3], *OPENAI["messages"][2:]], "tools": TOOLS},
            "result_without_call",
            "none was called",
        ),
        ({"messages": OPENAI["messages"][1:], "tools": TOOLS}, "turns", "cannot follow"),
        ({"messages": OPENAI["messages"], "tools": "[{]"}, "tools", "is no JSON"),
        ({"messages": OPENAI["messages"][:1], "tools": TOOLS}, "turns", "no turn of the assistant"),
    ],
)
def test_broken_records_are_refused_by_name(row: dict[str, Any], reason: str, message: str) -> None:
    with pytest.raises(RowError, match=message) as error:
        read_dialogue("t", row)
    assert error.value.reason == reason
