"""Which test rows are scored, and in which wordings: the same for every model, whatever other tasks there are.

Pure: a seed and the task's own name decide. Knows nothing of models or layouts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apprentice.tasks.schema import Task


class Request(NamedTuple):
    """One question: a test row in one wording, after `shots` exemplars."""

    task: str
    row: int  # source row number
    template: str
    shots: int


def requests_of(
    task: Task, test: NDArray[np.int64], shots: Sequence[int], *, max_examples: int, templates_per_row: int, seed: int
) -> list[Request]:
    """The requests of one task, rows in drawn order.

    A larger `max_examples` adds rows and keeps those there. Wordings go round in a drawn order, so each is met equally often, give
    or take one, and no row meets one twice: three wordings a b c, two per row, give ab, ca, bc.
    """
    random = np.random.default_rng(list(hashlib.sha256(f"evaluation {seed} {task.name}".encode()).digest()))
    names = [template.name for template in task.scored_templates]
    wordings = [names[place] for place in random.permutation(len(names))]
    per_row = min(templates_per_row, len(wordings))
    rows = test[random.permutation(len(test))[:max_examples]]
    return [
        Request(task.name, int(row), wordings[(number * per_row + turn) % len(wordings)], k)
        for number, row in enumerate(rows)
        for turn in range(per_row)
        for k in shots
    ]
