"""What training saw of a task: nothing of its cluster (`held_out`), other tasks of it (`scored_only`), or itself (`trained_on`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

from apprentice.tasks.schema import Task

Exposure = Literal["held_out", "scored_only", "trained_on"]
EXPOSURES: tuple[Exposure, ...] = get_args(Exposure)  # as shown; the least seen first


def exposures(tasks: Sequence[Task], kept_out: Collection[str], trained_clusters: Collection[str] = ()) -> dict[str, Exposure]:
    """Task → its exposure, where no row of the tasks `kept_out` is trained on, and the others and `trained_clusters` are."""
    seen = {task.cluster for task in tasks if task.name not in kept_out} | set(trained_clusters)
    return {
        task.name: "trained_on" if task.name not in kept_out else "scored_only" if task.cluster in seen else "held_out"
        for task in tasks
    }


def exposure_in(about: Mapping[str, Any]) -> dict[str, Any]:
    """The exposure in what a table of predictions says of a task; tables before version 2 know two kinds only."""
    found = about.get("exposure") or ("held_out" if about["held_out"] else "trained_on")
    return {"exposure": found, "held_out": found == "held_out"}


def most_seen(found: Collection[Exposure]) -> Exposure:
    """Of a task that several runs met: what it is for all of them together."""
    return max(found, key=EXPOSURES.index)


def count_exposures(tasks: Sequence[Task], kept_out: Collection[str]) -> str:
    """How many `tasks` there are and how many of them are not trained on, in words."""
    seen = list(exposures(tasks, kept_out).values())
    beside = f", {seen.count('scored_only')} scored only" if "scored_only" in seen else ""
    return f"{len(tasks)} task{'s' if len(tasks) != 1 else ''}, {seen.count('held_out')} of them held out{beside}"
