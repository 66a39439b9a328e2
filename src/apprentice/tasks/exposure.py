"""Exposure of a task: how much training saw of it, from the least to the most.

    held_out     no task of its cluster
    scored_only  other tasks of its cluster
    trained_on   the task itself

Tasks that are held out or scored only are not trained on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

from apprentice.tasks.schema import Task

Exposure = Literal["held_out", "scored_only", "trained_on"]
EXPOSURES: tuple[Exposure, ...] = get_args(Exposure)  # in the order of display, the least seen first


def exposures(tasks: Sequence[Task], kept_out: Collection[str], trained_clusters: Collection[str] = ()) -> dict[str, Exposure]:
    """The exposure of each of `tasks`, by name.

    The tasks named in `kept_out` are not trained on; the others are, and `trained_clusters` by an earlier run.
    """
    seen = {task.cluster for task in tasks if task.name not in kept_out} | set(trained_clusters)
    return {
        task.name: "trained_on" if task.name not in kept_out else "scored_only" if task.cluster in seen else "held_out"
        for task in tasks
    }


def exposure_in(about: Mapping[str, Any]) -> dict[str, Any]:
    """The exposure recorded in a table of predictions for one task; tables before version 2 know only held out and trained on."""
    exposure = about.get("exposure") or ("held_out" if about["held_out"] else "trained_on")
    return {"exposure": exposure, "held_out": exposure == "held_out"}


def most_seen(exposures: Collection[Exposure]) -> Exposure:
    """The exposure of a task for several runs together: the greatest of theirs."""
    return max(exposures, key=EXPOSURES.index)


def count_exposures(tasks: Sequence[Task], kept_out: Collection[str]) -> str:
    """Number of tasks, and of those not trained on, in words."""
    seen = list(exposures(tasks, kept_out).values())
    beside = f", {seen.count('scored_only')} scored only" if "scored_only" in seen else ""
    return f"{len(tasks)} task{'s' if len(tasks) != 1 else ''}, {seen.count('held_out')} of them held out{beside}"
