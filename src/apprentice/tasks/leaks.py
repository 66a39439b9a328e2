"""Whether what is held out is learnt all the same, because a task that is trained on reads the same rows.

Compares where tasks say that their rows lie. Rows that came there in another way are found by `data.filters.decontaminate`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from apprentice.tasks.schema import Task


def leaks(tasks: Sequence[Task], held_out: Collection[str]) -> list[tuple[str, str, str]]:
    """(held-out task, task that is trained on, place that both name), for every such pair."""
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
