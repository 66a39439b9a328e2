"""Leak check: held-out tasks whose rows are trained on all the same, because another task reads the same source.

It compares the sources that tasks name. Equal rows in different sources are found by the decontamination filter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from apprentice.tasks.schema import Task


def leaks(tasks: Sequence[Task], held_out: Collection[str]) -> list[tuple[str, str, str]]:
    """(held-out task, task trained on, source that both name), for every such pair."""
    places: dict[str, list[str]] = {}
    for task in tasks:
        if task.name not in held_out:
            for place in _places(task):
                places.setdefault(place, []).append(task.name)
    return [
        (task.name, other, place)
        for task in tasks
        if task.name in held_out
        for place in _places(task)
        for other in places.get(place, ())
    ]


def _places(task: Task) -> Iterator[str]:
    for spec in task.sources:
        if spec.dataset is not None:
            yield f"dataset {spec.dataset}"
        if spec.hub is not None:
            yield f"hub dataset {spec.hub}{f', configuration {spec.config}' if spec.config else ''}"
        for file in sorted(set((spec.files or {}).values())):
            yield f"file {file}"
