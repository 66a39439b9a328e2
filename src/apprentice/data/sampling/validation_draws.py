"""Draws of validation rows: zero-shot, in the proportions of the training mixture, until a task has no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count

import numpy as np

from apprentice.data.index.task_index import TaskIndex
from apprentice.data.sampling.permutation import below, draw, key_of, permute
from apprentice.data.sampling.plan import Draw, Plan
from apprentice.tasks.schema import Task


def validation_draws(
    plan: Plan, tasks: Sequence[Task], indices: Mapping[str, TaskIndex], seed: int, chunk: int
) -> Iterator[list[Draw]]:
    """Every validation row at most once, in lists of at most `chunk` draws; a pure function of its arguments.

    Follows the plan's sequence of tasks and takes the next validation row of each. Ends with the first `chunk` positions whose
    tasks have no validation rows left.
    """
    rows_left = {task.name: _draws_of(task, indices[task.name], seed) for task in tasks}
    for number in count():
        training = plan.draws(number * chunk, (number + 1) * chunk)
        draws = [one for drawn in training if (one := next(rows_left[drawn.task], None)) is not None]
        if not draws:
            return
        yield draws


def _draws_of(task: Task, index: TaskIndex, seed: int) -> Iterator[Draw]:
    """The validation rows of one task, in an order and with templates drawn by the seed."""
    rows, templates = index.validation, task.scored_templates or task.templates
    order = rows[permute(np.arange(len(rows)), max(len(rows), 1), key_of(seed, task.name, "validation"))]
    choices = below(draw(key_of(seed, task.name, "validation templates"), order), len(templates))
    for number, row in zip(choices.tolist(), order.tolist(), strict=True):
        yield Draw(0, task.name, "zero_shot", templates[number].name, row, (), 0)
