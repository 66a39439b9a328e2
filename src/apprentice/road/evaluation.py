"""Scoring a run beside its base model, or a bare model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apprentice.artifacts import Run, find_run
from apprentice.data.pipeline import make_corpus
from apprentice.errors import RecipeError, RunError
from apprentice.hub import local_folder
from apprentice.recipe import Recipe, find_recipe, load_recipe
from apprentice.road.data import Progress, scratch_run
from apprentice.session import ray_session
from apprentice.storage import Folder


def evaluate_run(recipe: Recipe, *, progress: Progress) -> tuple[dict[str, Any], Path]:
    """Scores the run of `recipe` beside its base model; gives the report and its folder, which lies in the run."""
    from apprentice.evaluate import launch

    run = Run(Folder.at(recipe.storage) / recipe.name)
    if not run.is_trained:
        raise RunError(f"run {run.name!r} in {recipe.storage} has no trained model yet; train it first.")
    base_shots = recipe.evaluation.shots if recipe.evaluation.baseline_shots is None else recipe.evaluation.baseline_shots
    subjects = [launch.Subject("tuned", run.model.local, recipe.evaluation.shots)]
    if base_shots:
        subjects.insert(0, launch.Subject("base", local_folder(recipe.model.base), base_shots))
    with ray_session():
        corpus = make_corpus(recipe, run)
        folder = run.report.local
        report = launch.evaluate(recipe, corpus, subjects, folder, run=run, progress=lambda values: progress("evaluate", values))
    run.update_status(score=report["summary"]["score"])
    return report, folder


def evaluate_model(model: str, recipe: Recipe, out: Path | None, *, progress: Progress) -> tuple[dict[str, Any], Path]:
    """Scores a bare model (folder, hub id) on the tasks of `recipe`, spoken to in the recipe's layout."""
    from apprentice.evaluate import launch

    folder = local_folder(model)
    place = out or Path("reports") / folder.name
    subjects = [launch.Subject("model", folder, recipe.evaluation.shots)]
    with ray_session(), scratch_run(recipe) as scratch:
        corpus = make_corpus(recipe, scratch)
        return launch.evaluate(recipe, corpus, subjects, place, progress=lambda values: progress("evaluate", values)), place


def evaluate(
    target: str, overrides: Sequence[str], *, recipe: str | None, out: Path | None, storage: str, progress: Progress
) -> tuple[dict[str, Any], Path]:
    """Scores what `target` names: a recipe, a run (beside its base model), or a bare model on the tasks of `recipe`."""
    run = find_run(target, storage)
    if run is not None:
        return evaluate_run(load_recipe(run.recipe_file.local, overrides), progress=progress)
    if target.endswith((".yaml", ".yml")) or _is_shipped(target):
        return evaluate_run(load_recipe(find_recipe(target), overrides), progress=progress)
    if recipe is None:
        raise RecipeError(f"{target!r} is not a run or a recipe; a bare model needs the tasks of a recipe: --recipe FILE.")
    return evaluate_model(target, load_recipe(find_recipe(recipe), overrides), out, progress=progress)


def _is_shipped(name: str) -> bool:
    try:
        find_recipe(name)
    except RecipeError:
        return False
    return True
