"""Chat templates as they are published: what is learnt and read under each, held against transformers and the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from apprentice.data.encoding.prompt_format import Layout
from apprentice.data.encoding.tokenize import LAST_TURN_ONLY, SECOND_THOUGHT, drop_reason, encode
from apprentice.errors import ChatTemplateError, ContractError
from apprentice.tasks.schema import Example
from tests.support.chat_templates import EXAMPLE, HEAD, MESSAGES, Tried, sources, stand_in, tried

PAGE = Path(__file__).parents[3] / "docs" / "guides" / "chat_templates.md"
CLOCKS = ("gptoss", "muse")  # write today's date
# Where a conversation is not, up to the end of its last answer, what the template writes: told in the documentation.
WITHOUT_A_SPACE = ("idefics3", "llava_next", "smolvlm")
OTHERWISE = ("qwen3", "glm4moe")  # the last answer as an earlier one; an end that the template writes with the next turn


@pytest.mark.parametrize("name", sources())
def test_a_template_is_learnt_as_the_documentation_says(name: str, tmp_path: Path) -> None:
    outcome = tried(name, tmp_path)
    layout = outcome.layout
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |")]
    assert rows == [outcome.row], "the page's table is what `python -m tests.support.chat_templates` prints"
    # Every answer with an end that is a token, and generation stops there.
    stops = {outcome.text([id]) for id in layout.stop_ids}
    answers = ["So."] if outcome.ours.truncated == LAST_TURN_ONLY else ["Because.", "So."]
    assert len(outcome.trained) == len(answers)
    assert all(text.startswith(answer) for answer, text in zip(answers, outcome.trained, strict=True))
    assert all(any(text.endswith(stop) for stop in stops) for text in outcome.trained)
    assert all(layout.tokenizer.is_added(id) for id in layout.stop_ids)
    # What is asked is how the row that was learnt begins.
    assert outcome.ours.ids[: len(layout.encode_chat(MESSAGES[:-1]))] == layout.encode_chat(MESSAGES[:-1])
    if outcome.ours.truncated is None:
        assert outcome.ours.ids[: outcome.ours.prompt_length] == layout.encode_prompt(layout.prompt(MESSAGES[0]["content"]))
    _check_text(outcome)


def _check_text(outcome: Tried) -> None:
    whole = outcome.layout._rendered(MESSAGES, generate=False, parts=outcome.layout._takes_parts)
    if not outcome.name.startswith(CLOCKS):
        texts = [
            dict(one, content=[{"type": "text", "text": one["content"]}]) if outcome.layout._takes_parts else one
            for one in MESSAGES
        ]
        theirs = outcome.layout.tokenizer._inner.apply_chat_template(texts, tokenize=False, date_string=outcome.layout.date)
        assert whole == theirs
    if outcome.name.startswith(WITHOUT_A_SPACE):
        whole = whole.replace(" Because.", "Because.").replace(" So.", "So.")
    if outcome.name not in OTHERWISE:
        ours = outcome.text(outcome.ours.ids)
        if outcome.name.startswith("phi3"):  # its marks swallow the newlines
            whole = whole.replace("|>\n", "|>")
        assert whole.startswith(ours)


def test_the_table_has_every_template_once() -> None:
    lines = PAGE.read_text(encoding="utf-8").split(HEAD)[1].splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert names == list(sources())


def over(name: str, folder: Path, **options: object) -> Layout:
    return Layout("chat", stand_in(name, sources()[name].read_text(encoding="utf-8"), folder), **options)  # type: ignore[arg-type]


def test_a_thought_of_the_answer_s_own_is_not_learnt_behind_an_empty_one(tmp_path: Path) -> None:
    thought = Example("t", "c", "Why?", "", "<think>\nHm.\n</think>\n\nBecause.")
    closed, open_ = over("qwen3_5_think", tmp_path / "closed"), over("qwen3", tmp_path / "open")
    assert encode(closed, [(thought, ()), (EXAMPLE, ())], 10_000)[0] is None
    assert drop_reason(closed, thought) == SECOND_THOUGHT
    [learnt] = encode(open_, [(thought, ())], 10_000)
    assert learnt is not None
    assert open_.tokenizer.decode(learnt.ids, skip_special=False).endswith(f"assistant\n{thought.target}<|im_end|>")


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6", "qwen3_8"])
def test_a_question_that_a_template_refuses_hinders_no_other(name: str, tmp_path: Path) -> None:
    layout = over(name, tmp_path)
    assert layout.prompt("Why?").endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    with pytest.raises(ChatTemplateError, match=r"refuses these messages: No user query found in messages\.$"):
        layout.prompt("<tool_response>f</tool_response>")
    refused = Example("t", "c", "<tool_response>f</tool_response>", "", "x")
    assert [encoded is None for encoded in encode(layout, [(refused, ()), (EXAMPLE, ())], 10_000)] == [True, False]
    assert drop_reason(layout, refused) == "refused_by_template"


def test_a_system_text_that_a_template_refuses_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"the chat template of .* refuses these messages: System role not supported\.$"):
        over("gemma", tmp_path, system="Be brief.").prompt("Why?")
    spoken = Example("t", "c", "Why?", "", "So.", system="Be brief.")
    layout = over("gemma", tmp_path)
    assert encode(layout, [(spoken, ())], 1000) == [None]
    assert drop_reason(layout, spoken) == "refused_by_template"


@pytest.mark.parametrize("name", ["gptoss", "llama3_2", "muse_glimmer"])
def test_the_day_does_not_change_a_prompt(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = over(name, tmp_path)
    assert layout.date in layout.prompt("Why?")
    from apprentice.pretrained import chat_template

    monkeypatch.setattr(chat_template, "_now", None)  # nobody looks at the clock
    assert layout.date in over(name, tmp_path).prompt("Why?")


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "phi3", "gptoss"])
def test_runs_of_the_first_version_keep_their_ids(name: str, tmp_path: Path) -> None:
    layout = over(name, tmp_path, version=1)
    theirs = layout.tokenizer.apply_chat_template(MESSAGES[:3], generate=True, date_string=layout.date)
    assert layout.encode_prompt(layout.chat_prompt(MESSAGES[:3])) == layout.tokenizer.encode(theirs)
    end = {"llama3": "<|eot_id|>", "qwen2_5": "<|im_end|>", "phi3": "<|end|>\n<|endoftext|>", "gptoss": "<|return|>"}[name]
    assert layout.end_ids == tuple(layout.tokenizer.encode(end))
    assert layout.encode_answers([end]) == [list(layout.end_ids)]
    new = over(name, tmp_path)
    if name in ("llama3", "qwen2_5"):  # where nothing was wrong, nothing changed
        assert new.encode_chat(MESSAGES[:3]) == layout.encode_chat(MESSAGES[:3])
