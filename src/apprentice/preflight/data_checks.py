"""Checks of a recipe's tasks, downloads and sources, without Ray."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from apprentice.data.encoding.quality import assign_classes
from apprentice.data.sources.locate import on_the_hub, resolve
from apprentice.errors import RecipeError
from apprentice.preflight.lookup import RecipeLookup
from apprentice.preflight.reward_checks import check_rewards
from apprentice.pretrained.hub import describe_download
from apprentice.recipe import Recipe
from apprentice.storage import Folder
from apprentice.tasks.exposure import count_exposures
from apprentice.tasks.importers.unpaired import has_labels
from apprentice.tasks.leaks import leaks
from apprentice.tasks.schema import Task


def check_tasks(lookup: RecipeLookup) -> str:
    """Checks that all tasks load, fit the objective and the layout, and that no held-out rows are trained on; counts them.

    Raises `TaskError` or `RecipeError`.
    """
    recipe, (tasks, held_out) = lookup.recipe, lookup.selection
    if leaked := leaks(tasks, held_out):
        kept_out, trained, place = leaked[0]
        others = sorted({f"{one} through {other}" for one, other, _ in leaked[1:]} - {f"{kept_out} through {trained}"})
        more = f" The same holds for {', '.join(others)}." if others else ""
        raise RecipeError(
            f"data.hold_out: {kept_out!r} is held out, but {trained!r} trains on the same rows ({place}); hold out both, or leave"
            f" one out of data.tasks.{more}"
        )
    if recipe.data.layout != "chat" and (with_turns := [task for task in tasks if any(one.has_turns for one in task.templates)]):
        raise RecipeError(
            f"data.layout: {recipe.data.layout} has no turns, and task {with_turns[0].name!r} holds conversations; use"
            " `layout: chat`."
        )
    if recipe.data.qualities is not None:
        assign_classes(recipe.data.qualities, tasks)
    objective = recipe.training.objective
    _check_labels(recipe, tasks, held_out)
    without_pairs = [
        task.name
        for task in tasks
        if recipe.training.aim.pairs and not recipe.training.aim.labels and task.name not in held_out and not task.has_pairs
    ]
    if without_pairs:
        raise RecipeError(
            f"training.objective {objective} learns from preferences, and task {without_pairs[0]!r} has no rejected answers; name"
            " files of preferences in data.tasks (`{preferences: pairs.jsonl}`), or hold the task out."
        )
    worded = [task.name for task in tasks if recipe.training.aim.teacher and task.name not in held_out and len(task.templates) > 1]
    if worded:
        raise RecipeError(
            f"training.objective {objective} has the teacher read each row once, and task {worded[0]!r} has several wordings; take"
            " files of finished instructions or conversations, or leave one template in the task."
        )
    unanswered = [task.name for task in tasks if not task.has_answers and (task.name in held_out or not recipe.training.aim.rounds)]
    if unanswered:
        raise RecipeError(
            f"task {unanswered[0]!r} has prompts without answers, from which only training.objective grpo learns and with which"
            " nothing can be scored; leave it out of data.tasks, or name another objective."
        )
    check_rewards(recipe.training.grpo.reward_terms, [task for task in tasks if task.name not in held_out])
    if recipe.training.aim.head and (generated := [task.name for task in tasks if not task.is_ranked]):
        raise RecipeError(
            f"training.objective {objective} makes a model that writes nothing, and task {generated[0]!r} is scored by what is"
            " written; leave it out of data.tasks, or take one whose choices are ranked."
        )
    return count_exposures(tasks, held_out)


def _check_labels(recipe: Recipe, tasks: Sequence[Task], held_out: Collection[str]) -> None:
    """Raises `RecipeError` where labelled answers are needed and missing, or would be taken for good ones."""
    objective, is_labelled = recipe.training.objective, recipe.training.aim.labels
    for task in tasks:
        if is_labelled and not has_labels(task) and task.name not in held_out:
            raise RecipeError(
                f"training.objective {objective} learns from labelled answers, and those of task {task.name!r} have no labels; name"
                " files of them in data.tasks (`{unpaired: answers.jsonl}`), or hold the task out."
            )
        if has_labels(task) and not is_labelled:
            raise RecipeError(
                f"task {task.name!r} has answers that are labelled undesirable, and training.objective {objective} would take them"
                " for good ones; take kto, or leave the task out of data.tasks."
            )
        if has_labels(task) and task.name in held_out:
            raise RecipeError(
                f"task {task.name!r} is held out, and nothing can be scored with answers of which some are undesirable; leave it"
                " out of data.hold_out."
            )


def list_downloads(lookup: RecipeLookup) -> str:
    """Names the models and datasets that the run would download."""
    recipe = lookup.recipe
    names = (recipe.model.base, *recipe.training.models.values())
    models = dict.fromkeys(model for name in names if (model := describe_download(name)))
    sets = sorted({name for task in lookup.tasks if (name := on_the_hub(task, recipe.data.root))})
    downloads = [f"model {model}" for model in models]
    if sets:
        downloads.append(f"{len(sets)} dataset{'s' if len(sets) > 1 else ''} from the hub ({', '.join(sets)}; sizes unknown)")
    return "; ".join(downloads) or "nothing"


def check_sources(lookup: RecipeLookup) -> str:
    """Reads the schemas of all training sources and counts their rows. Raises `DataError`, or `StorageError` for the cache."""
    rows = 0
    recipe, cache = lookup.recipe, Folder.at(lookup.recipe.storage) / "cache"
    rules = lookup.run.format  # as for the run's index, so that both use the same converted files
    for task in lookup.tasks:
        source = resolve(task, "train", root=recipe.data.root, cache=cache, rules=rules)
        rows += source.rows if source is not None else 0
    return f"{rows} training rows"
