"""Online evaluation: scores a model in memory, such as one in training, on a few test rows of each held-out task.

Each row is asked in one wording, without exemplars. The rows are the same each time, and are among those of a full evaluation. The
scores show how a run is going; no checkpoint is chosen by them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from apprentice.data.corpus import Corpus
from apprentice.errors import EvaluationError
from apprentice.evaluate.questions.prompts import encoded
from apprentice.evaluate.questions.row_selection import requests_of
from apprentice.evaluate.questions.subjects import limits_of, manner_of
from apprentice.evaluate.report.predictions import scored
from apprentice.evaluate.scoring.worker import Scorer, blocks, with_prediction
from apprentice.model_pool.limits import Manner
from apprentice.pretrained.hub import local_folder
from apprentice.tasks.schema import Task


@dataclass(frozen=True)
class Glance:
    """Online evaluation on `questions` (records of `predictions.ENCODED`) of held-out `tasks`; call it with a model."""

    questions: Sequence[dict[str, Any]]
    tasks: Sequence[Task]
    manner: Manner
    rank_by: str

    def __call__(self, model: Any) -> dict[str, float]:
        """Task → mean score, 0 to 100, over its questions. Raises `EvaluationError` where `model` cannot answer."""
        scorer = Scorer(lambda: model, "the model in training", self.manner)
        records = []
        for block in blocks(list(enumerate(self.questions)), 1):
            for answer in scorer(block).to_pylist():
                if answer["failure"]:
                    raise EvaluationError(answer["failure"])
                records.append(with_prediction(self.questions[answer["place"]], answer, self.rank_by))
        found: dict[str, list[float]] = defaultdict(list)
        for row in scored(records, self.tasks).to_pylist():
            found[row["task"]].append(row["score"])
        return {task: fmean(scores) for task, scores in sorted(found.items())}


def glance_of(corpus: Corpus) -> Glance:
    """Prepares the online evaluation of the recipe's `evaluation.while_training`, the number of rows of each task.

    Raises `EvaluationError` if no held-out task has test rows that can be asked.
    """
    recipe = corpus.recipe
    tasks = [task for task in corpus.tasks if task.name in corpus.held_out and corpus.indices[task.name].test_source is not None]
    settings: dict[str, Any] = {"max_examples": recipe.evaluation.while_training, "templates_per_row": 1, "seed": recipe.seed}
    requests = [request for task in tasks for request in requests_of(task, corpus.indices[task.name].test, [0], **settings)]
    table = encoded(corpus, requests, corpus.layout, limits_of(recipe, local_folder(recipe.model.base)))
    questions = [question for question in table.to_pylist() if not question["dropped"]]
    if not questions:
        raise EvaluationError(
            "evaluation.while_training asks held-out tasks, and the recipe has none with test rows that can be asked; name some in"
            " data.hold_out, or leave it out."
        )
    return Glance(questions, tasks, manner_of(recipe, corpus.layout), recipe.evaluation.rank_by)
