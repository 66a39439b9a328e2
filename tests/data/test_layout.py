"""Layouts: the exact text and ids of every one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.data.layout import Exemplar, Layout
from apprentice.errors import ContractError
from apprentice.tokenizer import Tokenizer

SHOT = Exemplar("Add.", "1 and 2", "3")
ALPACA = "Below is an instruction that describes a task"
ASK = "Write a response that appropriately completes the request."


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


def test_plain(tokenizer: Tokenizer) -> None:
    layout = Layout("plain", tokenizer)
    assert layout.prompt("Add.", "4 and 5") == "Add.\n\n4 and 5\n"
    assert layout.prompt("Say hello.") == "Say hello.\n"
    assert layout.prompt("Add.", "4 and 5", [SHOT, SHOT]) == (
        "Add.\n\n1 and 2\n3\n\n###\n\nAdd.\n\n1 and 2\n3\n\n###\n\nAdd.\n\n4 and 5\n"
    )
    assert Layout("plain", tokenizer, system="Be brief.").prompt("Say hello.") == "Be brief.\n\nSay hello.\n"
    assert layout.end_ids == (2,)
    assert layout.stop_ids == (2,)


def test_alpaca(tokenizer: Tokenizer) -> None:
    layout = Layout("alpaca", tokenizer)
    given = f"{ALPACA}, paired with an input that provides further context. {ASK}\n\n### Instruction:\nAdd.\n\n### Input:\n"
    assert layout.prompt("Add.", "4 and 5") == f"{given}4 and 5\n\n### Response:\n"
    assert layout.prompt("Say hello.") == f"{ALPACA}. {ASK}\n\n### Instruction:\nSay hello.\n\n### Response:\n"
    assert layout.prompt("Add.", "4 and 5", [SHOT]) == (
        f"{given}1 and 2\n\n### Response:\n3\n\n###\n\n{given}4 and 5\n\n### Response:\n"
    )


def test_chat(tokenizer: Tokenizer) -> None:
    layout = Layout("chat", tokenizer)
    own = "<|im_start|>system\nYou are a tiny apprentice.<|im_end|>\n"
    assert layout.prompt("Add.", "4 and 5") == f"{own}<|im_start|>user\nAdd.\n\n4 and 5<|im_end|>\n<|im_start|>assistant\n"
    assert layout.prompt("Add.", "4 and 5", [SHOT]) == (
        f"{own}<|im_start|>user\nAdd.\n\n1 and 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
        "<|im_start|>user\nAdd.\n\n4 and 5<|im_end|>\n<|im_start|>assistant\n"
    )
    asked = Layout("chat", tokenizer, system="Be brief.").prompt("Say hello.")
    assert asked == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n"
    assert layout.end_ids == (2,)


WORDS = st.sampled_from(["a", " ", "\n", "\n\n", "<|im_end|>", "<think>", "</think>", "{{ b }}", "é🙂", "<tool_response>"])


@settings(max_examples=100, deadline=None)
@given(instruction=st.lists(WORDS, max_size=5).map("".join), input=st.lists(WORDS, max_size=5).map("".join))
@pytest.mark.parametrize("template", ["own", "looks into the question"])
def test_a_lone_question_has_the_template_s_own_text(template: str, instruction: str, input: str, tokenizer: Tokenizer) -> None:
    layout = Layout("chat", tokenizer if template == "own" else Deaf(tokenizer))
    text = "\n\n".join(part for part in (instruction, input) if part)
    assert layout.prompt(instruction, input) == layout.chat_prompt([{"role": "user", "content": text}])


class Deaf(Tokenizer):
    """A tokenizer whose chat template leaves out what a model said to itself."""

    def __init__(self, other: Tokenizer) -> None:
        super().__init__(other.folder)

    def apply_chat_template(self, messages: Sequence[dict[str, str]], *, generate: bool, **variables: Any) -> str:
        kept = [message | {"content": message["content"].split("</think>")[-1].strip()} for message in messages]
        return super().apply_chat_template(kept, generate=generate, **variables)


def test_a_system_turn_of_the_caller_replaces_ours(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Shout."}, {"role": "user", "content": "Hello."}]
    expected = "<|im_start|>system\nShout.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n"
    assert Layout("chat", tokenizer, system="Be brief.").chat_prompt(messages) == expected


@pytest.mark.parametrize("name", ["plain", "alpaca", "chat"])
def test_prompt_and_answer_are_tokenised_apart(name: str, tokenizer: Tokenizer) -> None:
    layout = Layout(name, tokenizer)  # type: ignore[arg-type]
    prompt = layout.prompt("Add.", "4 and 5")
    assert layout.encode_prompt(prompt) == tokenizer.encode(prompt)
    assert layout.encode_prompts([prompt, "a"]) == [tokenizer.encode(prompt), tokenizer.encode("a")]
    assert layout.encode_answers(["9", "ten"]) == [tokenizer.encode("9"), tokenizer.encode("ten")]


class _Starting(Tokenizer):
    """A tokenizer that begins every text with the token 1."""

    start_ids = (1,)


def test_the_start_token_stands_once(tiny_model: Path) -> None:
    tokenizer = _Starting(tiny_model)
    for name in ("plain", "alpaca"):
        layout = Layout(name, tokenizer)  # type: ignore[arg-type]
        assert layout.encode_prompt("Add.") == [1, *tokenizer.encode("Add.")]
        assert layout.encode_answers(["9"]) == [tokenizer.encode("9")]
    chat = Layout("chat", tokenizer)
    assert chat.encode_prompt(chat.prompt("Add.")).count(1) == 3  # those of the template: system, user, assistant


def test_the_date_is_frozen(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "dated")
    (folder / "chat_template.jinja").write_text("Today is {{ date_string }}.{% for m in messages %}[{{ m.content }}]{% endfor %}")
    layout = Layout("chat", Tokenizer(folder), date="2024-02-29")
    assert layout.prompt("Hello.") == "Today is 2024-02-29.[Hello.]"
    assert layout.end_ids == tuple(layout.tokenizer.encode("]"))
    assert layout.stop_ids == tuple(sorted({2, layout.end_ids[-1]}))


def test_refusals(tokenizer: Tokenizer, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="layout 'vicuna' is unknown; choose one of plain, alpaca, chat"):
        Layout("vicuna", tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="layout `plain` has no turns; it takes one instruction"):
        Layout("plain", tokenizer).chat_prompt([{"role": "user", "content": "a"}])
    bare = shutil.copytree(tiny_model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ContractError, match="has no chat template; use layout `plain` or `alpaca`"):
        Layout("chat", Tokenizer(bare))
