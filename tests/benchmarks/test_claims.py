"""The variants behind the claims, and the table made of their reports."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.recipe import Recipe, find_recipe, load_recipe
from apprentice.tasks.registry import select_tasks
from benchmarks.learning import claims, methods
from tests.evaluate import tables
from tests.support.recipes import tiny_recipe


def test_each_question_has_its_runs(tiny_model: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model))
    variants = claims.variants_of(recipe, ["sentiment", "topic"], [2, 0], tmp_path)
    assert list(variants) == ["tiny-without-sentiment", "tiny-without-topic", "tiny-one-wording", "tiny-2-clusters"]
    assert [variant.name for variant in variants.values()] == list(variants)
    chosen = {name: select_tasks(variant.data.tasks, variant.data.hold_out, tmp_path) for name, variant in variants.items()}
    names = {name: {task.name for task in tasks} for name, (tasks, _) in chosen.items()}
    assert names["tiny-one-wording"] == names["tiny-without-sentiment"] == names["tiny-without-topic"]
    assert all(held_out == {"short_reviews", "message_moods"} for name, (_, held_out) in chosen.items() if "topic" not in name)
    for task in chosen["tiny-one-wording"][0]:
        assert (len(task.templates) == 1) is (task.cluster != "sentiment"), task.name
    trained = {task.cluster for task in chosen["tiny-2-clusters"][0] if task.cluster != "sentiment"}
    assert len(trained) == 2


def test_the_table_shows_base_tuned_and_interval() -> None:
    recipe = Recipe.model_validate({"name": "x", "model": {"base": "b"}, "data": {"tasks": ["a"]}, "training": {"steps": 1}})
    rows = claims.figures_of("all", tables.report_of(tables.table(recipe)))
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


def test_every_wording_of_the_held_out_tasks_is_shown() -> None:
    recipe = Recipe.model_validate({"name": "x", "model": {"base": "b"}, "data": {"tasks": ["a"]}, "training": {"steps": 1}})
    report = tables.report_of(tables.table(recipe))
    held_out = claims.wordings_of("all", report | {"pools": [pool for pool in report["pools"] if pool["held_out"]]})
    assert [(line["model"], line["mean"]) for line in held_out] == [("base", 50.0), ("tuned", 50.0)]
    shown = claims.table_of_wordings(held_out).splitlines()
    assert len(shown) == 4
    assert shown[2].startswith("| all | base | 50.0 | ")


def test_each_method_has_one_recipe_that_differs_in_nothing_else() -> None:
    recipes = {name: load_recipe(find_recipe(name)) for name in methods.RECIPES}
    assert {recipe.tuning.method for recipe in recipes.values()} == set(TUNING_METHODS) - {"qlora"}
    rates = {recipe.training.optimizer.learning_rate for recipe in recipes.values()}
    alike = [
        recipe.model_dump(exclude={"name": True, "tuning": True, "training": {"optimizer": {"learning_rate"}}})
        for recipe in recipes.values()
    ]
    assert len(rates) > 1
    assert alike == [alike[0]] * len(recipes)


def test_methods_side_by_side() -> None:
    recipe = Recipe.model_validate({"name": "x", "model": {"base": "b"}, "data": {"tasks": ["a"]}, "training": {"steps": 1}})
    pools = methods.pools_of(tables.report_of(tables.table(recipe)))
    assert {name: (pool["base"], pool["tuned"]) for name, pool in pools.items()} == {
        "held_out_ranked": (50.0, 50.0),
        "trained_on_ranked": (25.0, 75.0),
        "trained_on_generated": (75.0, 100.0),
    }
    line = {"trained": 1234, "trained_share": 0.0123, "memory_mib": 2048.0, "tokens_per_s": 321.6, "checkpoint_mib": 1.5}
    lines = {
        "lora": {**line, "kept_mib": 0.5, "pools": pools},
        "full": {**line, "memory_mib": None, "kept_mib": 9.0, "pools": pools},
    }
    shown = methods.table_of(lines).splitlines()
    assert shown[2] == "| base | – | – | – | – | – | 25.0 | 75.0 | 50.0 |"
    assert shown[3].startswith("| lora | 1,234 (1.23%) | 2.0 GiB | 322 | 1.5 MiB | 0.5 MiB | 75.0: +50.0 (")
    assert shown[4].startswith("| full | 1,234 (1.23%) | – |")
    assert len({line.count("|") for line in shown}) == 1
    assert methods.picture_of(lines).count("<svg") == 1


def test_memory_counts_the_training_workers_alone() -> None:
    class Process:
        def __init__(self, name: str, held_out: int) -> None:
            self.name, self.held = name, held_out

        def cmdline(self) -> list[str]:
            return [self.name]

        def memory_full_info(self) -> Any:
            if self.held < 0:
                raise psutil.NoSuchProcess(1)
            return SimpleNamespace(pss=self.held)

    worker = "ray::RayTrainWorker.run"
    processes = [Process(worker, 5), Process(worker, 7), Process("raylet", 100), Process(worker, -1)]
    assert sum(map(methods._held, processes)) == 12
