"""Conversations with functions and thoughts: what is learnt, behind which prompt, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apprentice.data.encoding.prompt_format import Layout, Reasoning
from apprentice.data.encoding.tokenize import CUT_TURNS, Tokenized, encode
from apprentice.errors import ContractError
from apprentice.tasks.importers.conversations import ConversationTemplate
from tests.support.chat_templates import sources, stand_in

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo <|im_end|>", "days": 2}'}}
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Oslo?"},
    {"role": "assistant", "content": None, "reasoning_content": "I must look.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "rain, rain"},
    {"role": "assistant", "content": "It rains.", "reasoning_content": "So it is."},
    {"role": "user", "content": "Thanks. And here?"},
    {"role": "assistant", "content": "I do not know."},
]
ROW = {"messages": MESSAGES, "tools": [WEATHER]}
# One template of each kind of call syntax, some that know no functions, and some that change earlier turns.
NAMES = (
    "qwen2_5",
    "qwen3",
    "qwen3_5_think",
    "glm4moe",
    "llama3_1",
    "lfm2_2_5",
    "nemotron_3_nano",
    "phi3",
    "gemma3",
    "deepseek_r1_distill",
)
THINKING = ("qwen3", "qwen3_5_think", "glm4moe", "lfm2_2_5", "nemotron_3_nano", "deepseek_r1_distill")


def layout_of(name: str, folder: Path, reasoning: Reasoning | None = None) -> Layout:
    return Layout("chat", stand_in(name, sources()[name].read_text(), folder), reasoning=reasoning)


def tokens_of(layout: Layout, row: dict[str, Any] = ROW, max_length: int = 4096, row_length: int = 9999) -> Tokenized:
    example = ConversationTemplate(name="c", instruction="", output="").example("t", row)
    tokens = encode(layout, [(example, ())], max_length, None, row_length)[0]
    assert tokens is not None
    return tokens


def stretches(layout: Layout, tokens: Tokenized) -> list[list[str]]:
    """For each segment, what is trained on."""
    texts = []
    for segment in tokens.answers:
        bounds = [segment.prompt_length, *(place for run in segment.untrained for place in run), len(segment.ids)]
        texts.append(
            [layout.tokenizer.decode(segment.ids[a:b], skip_special=False) for a, b in zip(bounds[::2], bounds[1::2], strict=False)]
        )
    return texts


@pytest.mark.parametrize("name", NAMES)
def test_what_the_assistant_says_is_learnt_calls_included_and_results_are_not(name: str, tmp_path: Path) -> None:
    layout = layout_of(name, tmp_path)
    tokens = tokens_of(layout)
    learnt = [text for segment in stretches(layout, tokens) for text in segment]
    assert len(learnt) == 3
    assert "weather" in learnt[0]
    assert "Oslo <|im_end|>" in learnt[0]
    assert "It rains." in learnt[1]
    assert "I do not know." in learnt[2]
    assert not any("rain, rain" in text or "I must look" in text for text in learnt)
    assert any(layout.tokenizer.decode(segment.ids).count("rain, rain") == 1 for segment in tokens.answers)
    assert {segment.ids[-1] for segment in tokens.answers} <= set(layout.call_stop_ids)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reasoning", [None, "train"])
def test_every_turn_is_learnt_behind_the_prompt_that_it_is_served_with(
    name: str, reasoning: Reasoning | None, tmp_path: Path
) -> None:
    if reasoning and name not in THINKING:
        return
    layout = layout_of(name, tmp_path, reasoning)
    tokens = tokens_of(layout)
    messages = [dict(message, content=message["content"] or "") for message in MESSAGES]
    for place in (2, 4, 6):
        prompt = layout.encode_chat(messages[:place], [WEATHER])
        follow = [segment for segment in tokens.answers if segment.ids[: len(prompt)] == prompt and len(segment.ids) > len(prompt)]
        assert follow, f"no segment has the prompt of message {place}"


@pytest.mark.parametrize("name", THINKING)
def test_thoughts_are_learnt_or_shown_or_left_out(name: str, tmp_path: Path) -> None:
    learnt = {}
    for reasoning in ("train", "mask", "drop"):
        (folder := tmp_path / reasoning).mkdir()
        layout = layout_of(name, folder, reasoning)  # type: ignore[arg-type]
        tokens = tokens_of(layout)
        learnt[reasoning] = "|".join(text for segment in stretches(layout, tokens) for text in segment)
        shown = "|".join(layout.tokenizer.decode(segment.ids) for segment in tokens.answers)
        assert shown.count("I must look.") == (0 if reasoning == "drop" else max(1, shown.count("I must look.")))
        assert "It rains." in learnt[reasoning]
    assert "I must look." in learnt["train"]
    assert "So it is." in learnt["train"]
    assert "I must look." not in learnt["mask"] + learnt["drop"]


def test_turns_share_a_segment_where_the_text_before_them_stays(tmp_path: Path) -> None:
    layout = layout_of("qwen3", tmp_path, "train")
    # Qwen3 keeps the thoughts behind the last question: the call and its answer are one segment, and the next question another.
    assert [len(texts) for texts in stretches(layout, tokens_of(layout))] == [2, 1]
    (other := tmp_path / "other").mkdir()
    assert [len(texts) for texts in stretches(layout, tokens_of(layout_of("qwen3", other)))] == [3]


def test_what_is_too_long_loses_its_last_turns(tmp_path: Path) -> None:
    layout = layout_of("qwen3", tmp_path, "train")
    whole = tokens_of(layout)
    assert whole.truncated is None
    room = len(whole.ids)
    assert whole.size > room
    cut = tokens_of(layout, row_length=room)
    assert (cut.truncated, cut.others, cut.ids) == (CUT_TURNS, (), whole.ids)
    shorter = tokens_of(layout, max_length=room - 1)
    assert shorter.truncated == CUT_TURNS
    assert len(stretches(layout, shorter)[0]) == 1


def test_inline_thoughts_and_reasoning_content_are_one(tmp_path: Path) -> None:
    layout = layout_of("qwen3", tmp_path, "train")
    apart = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]}
    inline = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nc\n</think>\n\nb"}]}
    assert tokens_of(layout, apart).ids == tokens_of(layout, inline).ids


def test_a_template_that_drops_functions_is_refused(tmp_path: Path) -> None:
    layout = layout_of("deepseekv3", tmp_path)
    with pytest.raises(ContractError, match="drops the list of tools without a word"):
        tokens_of(layout)


def test_a_golden_conversation_is_the_same_from_any_arguments(tmp_path: Path) -> None:
    layout = layout_of("qwen2_5", tmp_path)
    function = CALL["function"]
    assert isinstance(function, dict)
    parsed = dict(CALL, id="another", function=dict(function, arguments=json.loads(str(function["arguments"]))))
    renamed = [dict(MESSAGES[2], tool_calls=[parsed]), dict(MESSAGES[3], tool_call_id="another")]
    assert layout.encode_chat([*MESSAGES[:2], *renamed], [WEATHER]) == layout.encode_chat(MESSAGES[:4], [WEATHER])
