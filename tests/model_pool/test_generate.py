"""The scored part of a reply: calls by their parsed form, and what stands behind a thought."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apprentice.data.encoding.prompt_format import Layout
from apprentice.evaluate.stats.metrics import METRICS
from apprentice.model_pool.generate import reply_text
from apprentice.tasks.builtin import rows
from apprentice.tasks.registry import find_tasks
from tests.support.chat_templates import sources, stand_in

TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "F.",
                "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
            },
        }
    ]
)


@pytest.mark.parametrize("name", ["qwen3", "phi3", "qwen3_5_think", "gptoss"])
def test_calls_are_scored_in_the_syntax_of_the_template(name: str, tmp_path: Path) -> None:
    layout = Layout("chat", stand_in(name, sources()[name].read_text(), tmp_path))
    calls = layout.reply_syntax.calls
    assert calls is not None
    messages = [{"role": "user", "content": "Go."}]
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "7"}'}}]}
    turn = layout.dialogue_template([]).turn([*messages, message], json.loads(TOOLS))
    ids = [id for part in layout.encode_turn(turn, turn.ends[0]) for id in part]
    assert json.loads(reply_text(layout, ids, {"tools": TOOLS})) == [{"name": "f", "arguments": {"a": "7"}}]


def test_the_answer_behind_a_thought_is_scored(tmp_path: Path) -> None:
    for name, text in (("qwen3", "<think>\n1 + 1\n</think>\n\n2"), ("qwen3_5_think", "1 + 1\n</think>\n\n2")):
        (folder := tmp_path / name).mkdir()
        layout = Layout("chat", stand_in(name, sources()[name].read_text(), folder), reasoning="train")
        assert reply_text(layout, layout.tokenizer.encode(text + "<|im_end|>"), {}) == "2"


def calls(*values: object) -> str:
    return json.dumps([{"name": "f", "arguments": value} for value in values])


@pytest.mark.parametrize(
    ("prediction", "reference", "is_right"),
    [
        (calls({"a": 1, "b": [1, 2]}), calls({"b": [1, 2], "a": 1.0}), True),
        (calls({"a": 1}, {"a": 2}), calls({"a": 2}, {"a": 1}), True),
        (calls({"a": 1}, {"a": 1}), calls({"a": 1}), False),
        (calls({"a": "1"}), calls({"a": 1}), False),
        (calls({"a": True}), calls({"a": 1}), False),
        (calls({"b": [2, 1]}), calls({"b": [1, 2]}), False),
        (calls('{"a": '), calls({"a": 1}), False),
        ("I cannot.", "No function here can do that.", True),
        (calls({}), "No function here can do that.", False),
        ("I cannot.", calls({}), False),
    ],
)
def test_calls_are_compared_by_their_parsed_form(prediction: str, reference: str, is_right: bool) -> None:
    assert METRICS["tool_calls"].score_one(prediction, [reference]) == 100.0 * is_right


def test_the_library_has_one_call_two_and_none_and_every_call_keeps_to_its_schema() -> None:
    task = find_tasks("device_calls", Path())[0]
    examples = [task.render(row, template) for row in rows("device_calls", "train") for template in task.templates]
    counts = {len(example.dialogue.turns[-1].calls) for example in examples if example.dialogue is not None}
    assert counts == {0, 1, 2}
    assert len(examples) == 800
    assert all(METRICS["tool_calls"].score_one(example.target, example.references) == 100.0 for example in examples)
    assert rows("device_calls", "test") == rows("device_calls", "test")


def test_the_reasoning_task_is_scored_by_its_total() -> None:
    task = find_tasks("thought_sums", Path())[0]
    for row in rows("thought_sums", "test"):
        example = task.render(row, task.templates[0])
        assert example.references == (row["total"],)
        assert example.target.endswith(f"</think>\n\n{row['total']}")
        assert sum(map(int, row["problem"].removeprefix("What is ").removesuffix("?").split(" + "))) == int(row["total"])
