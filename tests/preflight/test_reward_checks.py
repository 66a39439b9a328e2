"""Reward functions that would be silently wrong are refused before anything is reserved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from apprentice.errors import RecipeError
from apprentice.preflight.check import run_check
from apprentice.recipe import load_recipe
from tests.support.on_policy import round_recipe

PROMPTS = '{"prompt": "Name a colour."}\n{"prompt": "Name a tree."}\n'


def check_reward(folder: Path, reward: Any, tasks: list[Any]) -> str:
    return run_check("tasks", load_recipe(round_recipe(folder, Path("base"), training__grpo__reward=reward, data__tasks=tasks)))


def test_functions_that_can_be_made_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards.py").write_text("import os\ndef good(completions, **others): return [0.0] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    terms = [{"function": "math"}, {"function": "python:own_rewards:good"}, {"model": "run:judge"}]
    assert "1 task" in check_reward(tmp_path, terms, ["word_problems"])
    assert "own_rewards" not in sys.modules


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ({"function": "python:no_rewards:good"}, "module no_rewards cannot be imported: ModuleNotFoundError"),
        ({"function": "json_schema", "json_schema": {"type": "nothing"}}, "the schema is no JSON Schema"),
    ],
)
def test_functions_that_cannot_be_made(reward: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"^reward function .*{words}.*; correct training\.grpo\.reward\.$"):
        check_reward(tmp_path, reward, ["word_problems"])


@pytest.mark.parametrize("function", ["math", "exact_match"])
def test_prompts_without_answers_have_nothing_to_compare_with(function: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)
    with pytest.raises(
        RecipeError, match=f"function {function} compares a reply with the row's answers, and task '.*' has prompts"
    ):
        check_reward(tmp_path, {"function": function}, [{"prompts": str(tmp_path / "prompts.jsonl")}])
