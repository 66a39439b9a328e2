"""Preference records: the ways of writing them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from apprentice.errors import RowError
from apprentice.tasks.importers.preferences import preference_tasks
from apprentice.tasks.registry import find_tasks
from apprentice.tasks.schema import Example

[TASK] = preference_tasks({"preferences": "pairs.jsonl"})


def example(**row: Any) -> Example:
    return TASK.render(row, TASK.templates[0])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PLAIN = example(prompt="Two and two?", chosen=" Four.", rejected="Five.")
WAYS: dict[str, dict[str, Any]] = {
    "messages": {"prompt": [user("Two and two?")], "chosen": [said("Four.")], "rejected": [said("Five.")]},
    "whole conversations": {
        "chosen": [user("Two and two?"), said("Four.")],
        "rejected": [user("Two and two?"), said("Five.")],
    },
    "whole conversations and the prompt as text": {
        "prompt": "Two and two?",
        "chosen": [user("Two and two?"), said("Four.")],
        "rejected": [user("Two and two?"), said("Five.")],
    },
    "told as text": {
        "chosen": "\n\nHuman: Two and two?\n\nAssistant: Four.",
        "rejected": "\n\nHuman: Two and two?\n\nAssistant: Five.",
    },
    "prompt told as text": {"prompt": "\n\nHuman: Two and two?\n\nAssistant:", "chosen": "Four.", "rejected": "Five."},
}


def test_texts():
    assert Example(TASK.name, "preference", "Two and two?", "", "Four.", ("Five.", "Four."), ("Four.",), rejected="Five.") == PLAIN
    assert TASK.has_pairs
    assert TASK.is_ranked
    assert TASK.metrics == ("accuracy", "length_bias")


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_says_the_same(way):
    assert example(**WAYS[way]) == PLAIN


def test_earlier_turns_and_a_system_text():
    before = [{"role": "system", "content": "Be brief."}, user("Hello."), said("Hi."), user("Two and two?")]
    pair = example(chosen=[*before, said("Four.")], rejected=[*before, said("Five.")])
    assert (pair.system, pair.history, pair.instruction) == ("Be brief.", (("Hello.", "Hi."),), "Two and two?")
    assert (pair.target, pair.rejected) == ("Four.", "Five.")


def test_choices_do_not_tell_which_is_better():
    assert example(prompt="?", chosen="a", rejected="b").choices == example(prompt="?", chosen="b", rejected="a").choices


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "equal_answers": ({"prompt": "?", "chosen": "Yes.", "rejected": " Yes. "}, "both answers of the pair are the same"),
    "null": ({"prompt": "?", "chosen": "Yes.", "rejected": None}, "no 'rejected' answer"),
    "prompts_differ": (
        {"chosen": [user("a"), said("x")], "rejected": [user("b"), said("y")]},
        "do not follow the same conversation",
    ),
    "turns": ({"prompt": "?", "chosen": [said("x"), user("b")], "rejected": [said("y"), user("b")]}, "does not end with"),
    "empty_answer": ({"prompt": "?", "chosen": "x", "rejected": "  "}, "rejected answer is empty"),
}


@pytest.mark.parametrize("reason", WRONG)
def test_what_is_refused(reason):
    row, words = WRONG[reason]
    with pytest.raises(RowError, match=words) as caught:
        example(**row)
    assert caught.value.reason == reason


def test_a_pair_without_a_question_is_refused():
    with pytest.raises(RowError, match="beginning with a question"):
        example(chosen="x", rejected="y")


def test_a_recipe_names_it(tmp_path):
    [task] = find_tasks({"preferences": "/data/pairs.jsonl", "test": "/data/held.jsonl", "cluster": "taste"}, tmp_path)
    assert (task.name, task.cluster) == ("preferences_pairs", "taste")
    assert task.sources[0].files == {"train": "/data/pairs.jsonl", "test": "/data/held.jsonl"}
    splits = {"train": "train_prefs", "test": "test_prefs"}
    [hub] = find_tasks({"preferences": "somebody/choices", "splits": splits}, tmp_path)
    assert (hub.name, [spec.dataset or spec.hub for spec in hub.sources]) == (
        "preferences_choices",
        ["choices", "somebody/choices"],
    )
    assert [spec.splits for spec in hub.sources] == [splits, splits]
    assert TASK.sample is not None
    assert example(**TASK.sample).rejected == "Any."
