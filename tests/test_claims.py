"""The variants behind the claims, and the table made of their reports."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from apprentice.evaluate.summary import summarise
from apprentice.recipe import load_recipe
from apprentice.tasks.loading import select_tasks
from tests.evaluate import tables
from tests.recipes import tiny_recipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("claims", BENCHMARKS / "claims.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def test_each_question_has_its_runs(claims: ModuleType, tiny_model: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model))
    found = claims.variants_of(recipe, ["sentiment", "topic"], [2, 0], tmp_path)
    assert list(found) == ["tiny-without-sentiment", "tiny-without-topic", "tiny-one-wording", "tiny-2-clusters"]
    assert [variant.name for variant in found.values()] == list(found)
    chosen = {name: select_tasks(variant.data.tasks, variant.data.hold_out, tmp_path) for name, variant in found.items()}
    names = {name: {task.name for task in tasks} for name, (tasks, _) in chosen.items()}
    assert names["tiny-one-wording"] == names["tiny-without-sentiment"] == names["tiny-without-topic"]
    assert all(held_out == {"short_reviews", "message_moods"} for name, (_, held_out) in chosen.items() if "topic" not in name)
    for task in chosen["tiny-one-wording"][0]:
        assert (len(task.templates) == 1) is (task.cluster != "sentiment"), task.name
    trained = {task.cluster for task in chosen["tiny-2-clusters"][0] if task.cluster != "sentiment"}
    assert len(trained) == 2


def test_the_table_shows_base_tuned_and_interval(claims: ModuleType) -> None:
    from apprentice.recipe import Recipe

    recipe = Recipe.model_validate({"name": "x", "model": {"base": "b"}, "data": {"tasks": ["a"]}, "training": {"steps": 1}})
    rows = claims.figures_of("all", summarise(tables.table(recipe), resamples=200))
    assert [(row["pool"], row["base"], row["tuned"]) for row in rows] == [
        ("held_out_ranked", 50.0, 50.0),
        ("trained_on_ranked", 25.0, 75.0),
        ("trained_on_generated", 75.0, 100.0),
    ]
    lines = claims.table_of(rows).splitlines()
    assert len(lines) == 5
    assert re.fullmatch(
        r"\| all \| trained on ranked \(1\) \| 25\.0 \| 75\.0 \| \+50\.0 \(\+.* to \+.*\) \| 0\.\d+ \| 0\.0 \|", lines[3]
    )
    assert claims.picture_of(rows).count("<svg") == 1
