"""What training saw of a task."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from apprentice.data.corpus import make_corpus
from apprentice.evaluate.report.metadata import make_metadata
from apprentice.pipeline.evaluate import trained_clusters
from apprentice.preflight.check import run_check
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder
from apprentice.tasks.exposure import exposure_in, exposures
from apprentice.tasks.schema import Task


def task(name: str, cluster: str, *splits: str) -> Task:
    return Task.model_validate(
        {
            "name": name,
            "cluster": cluster,
            "summary": "About it.",
            "sources": [{"files": {split: f"{split}.jsonl" for split in splits}}],
            "answer": "{{ text }}",
            "metrics": ["exact_match"],
            "templates": [{"name": "plain", "instruction": "Say it."}],
        }
    )


def test_three_kinds() -> None:
    tasks = [task("a", "one", "train"), task("b", "one", "test"), task("c", "two", "test"), task("d", "three", "train")]
    assert exposures(tasks, {"b", "c", "d"}) == {"a": "trained_on", "b": "scored_only", "c": "held_out", "d": "held_out"}
    assert exposures(tasks, {"b", "c", "d"}, {"three"})["d"] == "scored_only"
    assert exposures(tasks[1:2], {"b"}) == {"b": "held_out"}


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"held_out": True}, {"exposure": "held_out", "held_out": True}),  # reports before version 2 know two kinds
        ({"held_out": False}, {"exposure": "trained_on", "held_out": False}),
        ({"held_out": False, "exposure": "scored_only"}, {"exposure": "scored_only", "held_out": False}),
    ],
)
def test_what_earlier_reports_say_is_understood(about: dict[str, object], expected: dict[str, object]) -> None:
    assert exposure_in(about) == expected


def test_a_task_without_training_rows_is_not_held_out_where_its_cluster_is_trained_on(tiny_model: Path, tmp_path: Path) -> None:
    for name, cluster, splits in (("yes", "mine", ("train", "test")), ("no", "mine", ("test",)), ("far", "other", ("test",))):
        for split in splits:
            (tmp_path / f"{name}-{split}.jsonl").write_text("".join(f'{{"text": "{name} {n}"}}\n' for n in range(30)))
        about = task(name, cluster, *splits).model_dump(mode="json", exclude_defaults=True)
        about["sources"] = [{"files": {split: f"{name}-{split}.jsonl" for split in splits}}]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(about))
    recipe = Recipe.model_validate(
        {
            "name": "kinds",
            "storage": str(tmp_path / "runs"),
            "model": {"base": str(tiny_model)},
            "data": {"tasks": [str(tmp_path / f"{name}.yaml") for name in ("yes", "no", "far")]},
            "training": {"steps": 1},
        }
    )
    assert run_check("tasks", recipe) == "3 tasks, 1 of them held out, 1 scored only"
    corpus = make_corpus(recipe, Run(Folder.at(recipe.storage) / recipe.name), parallel=False)
    facts = make_metadata(recipe, corpus.tasks, corpus.held_out, {"yes": None, "no": None, "far": None}, 0.0)
    assert {name: (about["exposure"], about["held_out"]) for name, about in facts["tasks"].items()} == {
        "yes": ("trained_on", False),
        "no": ("scored_only", False),
        "far": ("held_out", True),
    }


def test_what_a_run_goes_on_from_was_trained_on_too(recipe_of_base: Recipe, tmp_path: Path) -> None:
    before = Run(Folder.at(tmp_path) / "before")
    before.recipe_file.write_text(yaml.safe_dump(recipe_of_base.model_dump(mode="json")))
    after = recipe_of_base.model_copy(
        update={
            "model": recipe_of_base.model.model_copy(update={"base": f"run:{tmp_path}/before"}),
            "data": recipe_of_base.data.model_copy(update={"tasks": ("written_dates",), "hold_out": ()}),
        }
    )
    assert trained_clusters(recipe_of_base) == {"sentiment"}
    assert trained_clusters(after) == {"sentiment", *trained_clusters(after.model_copy(update={"model": recipe_of_base.model}))}
    assert len(trained_clusters(after)) == 2


@pytest.fixture
def recipe_of_base(tiny_model: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "before",
            "model": {"base": str(tiny_model)},
            "data": {"tasks": ["short_reviews", "same_meaning"], "hold_out": ["same_meaning"]},
            "training": {"steps": 1},
        }
    )
