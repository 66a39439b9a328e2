"""Which test rows are scored, and in which wordings: the same for every model, whatever other tasks there are.

Pure: a seed and the task's own name decide. Knows nothing of models or layouts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apprentice.tasks.schema import Task


class Request(NamedTuple):
    """One question: a test row in one wording, after `shots` exemplars, changed on purpose by a `perturbation` or by none."""

    task: str
    row: int  # source row number
    template: str
    shots: int
    perturbation: str = ""  # a name in `apprentice.evaluate.questions.perturbation.PERTURBATIONS`


def requests_of(
    task: Task,
    test: NDArray[np.int64],
    shots: Sequence[int],
    *,
    max_examples: int,
    templates_per_row: int | Literal["all"],
    seed: int,
    perturbations: Sequence[str] = (),
) -> list[Request]:
    """The requests of one task, rows in drawn order.

    A larger `max_examples` adds rows and keeps those there. Wordings go round in a drawn order, so each is met equally often, give
    or take one, and no row meets one twice: three wordings a b c, two per row, give ab, ca, bc. Perturbations change a row's first
    wording, with the fewest exemplars.
    """
    random = np.random.default_rng(list(hashlib.sha256(f"evaluation {seed} {task.name}".encode()).digest()))
    names = [template.name for template in task.scored_templates]
    wordings = [names[place] for place in random.permutation(len(names))]
    per_row = len(wordings) if templates_per_row == "all" else min(templates_per_row, len(wordings))
    rows = test[random.permutation(len(test))[:max_examples]]
    found = []
    for number, row in enumerate(rows.tolist()):
        met = [wordings[(number * per_row + turn) % len(wordings)] for turn in range(per_row)]
        found += [Request(task.name, row, wording, k) for wording in met for k in shots]
        found += [Request(task.name, row, met[0], min(shots), kind) for kind in perturbations]
    return found
