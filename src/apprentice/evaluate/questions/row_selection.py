"""Selection of the test rows and wordings (templates) that are scored, the same for every model.

The selection is a pure function of the seed and the task, so it does not depend on the other tasks of a recipe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apprentice.tasks.schema import Task


class QuestionRequest(NamedTuple):
    """Request for one question: a test row in one wording, after `shots` exemplars, with a perturbation or none ("")."""

    task: str
    row: int  # source row number
    template: str
    shots: int
    perturbation: str = ""  # a name in `apprentice.evaluate.questions.perturbation.PERTURBATIONS`


def select_requests(
    task: Task,
    test: NDArray[np.int64],
    shots: Sequence[int],
    *,
    max_examples: int,
    templates_per_row: int | Literal["all"],
    seed: int,
    perturbations: Sequence[str] = (),
) -> list[QuestionRequest]:
    """Selects the requests of one task; `test` are its usable test rows, at most `max_examples` are drawn, in random order.

    A larger `max_examples` adds rows and keeps the earlier ones. Wordings take turns in a random order, so each is used equally
    often, give or take one, and none twice for a row: wordings a b c, two per row, give ab, ca, bc. Every wording is asked with
    each number of `shots`. Perturbations apply to the first wording of a row, with the fewest exemplars.
    """
    random = np.random.default_rng(list(hashlib.sha256(f"evaluation {seed} {task.name}".encode()).digest()))
    names = [template.name for template in task.scored_templates]
    wordings = [names[place] for place in random.permutation(len(names))]
    per_row = len(wordings) if templates_per_row == "all" else min(templates_per_row, len(wordings))
    rows = test[random.permutation(len(test))[:max_examples]]
    requests = []
    for number, row in enumerate(rows.tolist()):
        chosen = [wordings[(number * per_row + turn) % len(wordings)] for turn in range(per_row)]
        requests += [QuestionRequest(task.name, row, wording, k) for wording in chosen for k in shots]
        requests += [QuestionRequest(task.name, row, chosen[0], min(shots), kind) for kind in perturbations]
    return requests
