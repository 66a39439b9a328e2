"""Command line of the jobs: the flags of each stage, several recipes in order, and exit code 2 for wrong usage."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from apprentice.console import Screen
from apprentice.jobs import run_job, stages
from apprentice.recipe import Recipe
from tests.support.recipes import tiny_recipe


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The stages that were run: (stage, the run's name, the recipe's seed, deploy)."""
    calls_made: list[tuple[Any, ...]] = []

    def train(recipe: Recipe, screen: Screen) -> None:
        calls_made.append(("train", recipe.name, recipe.seed, False))

    def whole(recipe: Recipe, screen: Screen, *, deploy: bool) -> None:
        calls_made.append(("pipeline", recipe.name, recipe.seed, deploy))

    monkeypatch.setitem(stages.STAGES, "train", train)
    monkeypatch.setattr(stages, "run_pipeline", whole)
    return calls_made


def two_recipes(folder: Path) -> list[str]:
    (folder / "second").mkdir()
    return [str(tiny_recipe(folder, Path("/models/a"))), str(tiny_recipe(folder / "second", Path("/models/a"), name="second"))]


def test_each_recipe_in_order_and_the_last_is_deployed(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    first, second = two_recipes(tmp_path)
    run_job("pipeline", ["--recipe", first, "--recipe", second, "--deploy", "seed=7"])
    run_job("train", ["seed=8", "--recipe", first])
    assert calls == [("pipeline", "tiny", 7, False), ("pipeline", "second", 7, True), ("train", "tiny", 8, False)]


def test_the_words_are_the_command_lines(calls: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = str(tiny_recipe(tmp_path, Path("/models/a")))
    monkeypatch.setattr(sys, "argv", ["jobs/train.py", "--recipe", recipe])
    run_job("train")
    monkeypatch.setattr(sys, "argv", ["python -m apprentice.jobs", "train", "--recipe", recipe])
    with pytest.raises(SystemExit) as end:
        stages.main()
    assert not end.value.code
    assert calls == [("train", "tiny", 3, False)] * 2


@pytest.mark.parametrize("words", [[], ["nonsense"], ["train"], ["train", "--recipe"], ["train", "--recipe", "r", "--deploy"]])
def test_wrong_usage_is_two(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m apprentice.jobs", *words])
    with pytest.raises(SystemExit) as end:
        stages.main()
    assert end.value.code == 2
    assert capsys.readouterr().err
