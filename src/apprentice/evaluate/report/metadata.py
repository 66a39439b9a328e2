"""Metadata of a report: the recipe, the evaluation's settings, package versions, and a description of each task."""

from __future__ import annotations

import platform
import time
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from apprentice import __version__
from apprentice.recipe import Recipe
from apprentice.tasks.exposure import exposures
from apprentice.tasks.schema import Task

PACKAGES = ("torch", "transformers", "ray", "sacrebleu", "rouge-score")


def make_metadata(
    recipe: Recipe,
    tasks: Sequence[Task],
    kept_out: Collection[str],
    majorities: Mapping[str, dict[str, Any] | None],
    started: float,
    trained_clusters: Collection[str] = (),
) -> dict[str, Any]:
    """Facts about the tasks in `majorities` (those scored) and about this evaluation, begun at `started` (seconds since 1970).

    No rows of the tasks `kept_out` were trained on; those of the others and of `trained_clusters` were.
    """
    exposure_of = exposures(tasks, kept_out, trained_clusters)
    return {
        "version": 2,  # of the facts: 1 had no exposures
        "name": recipe.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "seed": recipe.seed,
        "versions": {"apprentice": __version__, "python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "recipe": recipe.model_dump(mode="json"),
        "settings": recipe.evaluation.model_dump(mode="json"),
        "tasks": {
            task.name: {
                "cluster": task.cluster,
                "summary": task.summary,
                "kind": "ranked" if task.is_ranked else "generated",
                "metrics": list(task.metrics),
                "held_out": exposure_of[task.name] == "held_out",
                "exposure": exposure_of[task.name],
                "majority": majorities[task.name],
            }
            for task in tasks
            if task.name in majorities
        },
    }
