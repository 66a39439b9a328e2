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
from apprentice.evaluate.questions.evaluation_subjects import make_answer_settings, make_token_limits
from apprentice.evaluate.questions.question_encoding import encode_questions
from apprentice.evaluate.questions.row_selection import select_requests
from apprentice.evaluate.report.predictions import score_predictions
from apprentice.evaluate.scoring.scorer import Scorer, make_blocks, with_prediction
from apprentice.model_pool.answer_settings import AnswerSettings
from apprentice.pretrained.hub import local_folder
from apprentice.tasks.schema import Task


@dataclass(frozen=True)
class OnlineEvaluation:
    """Online evaluation on `questions` (records of `predictions.ENCODED_QUESTION`) of held-out `tasks`; call it with a model."""

    questions: Sequence[dict[str, Any]]
    tasks: Sequence[Task]
    answer_settings: AnswerSettings
    rank_by: str

    def __call__(self, model: Any) -> dict[str, float]:
        """Task → mean score, 0 to 100, over its questions. Raises `EvaluationError` where `model` cannot answer."""
        scorer = Scorer(lambda: model, "the model in training", self.answer_settings)
        records = []
        for block in make_blocks(list(enumerate(self.questions)), 1):
            for answer in scorer(block).to_pylist():
                if answer["failure"]:
                    raise EvaluationError(answer["failure"])
                records.append(with_prediction(self.questions[answer["place"]], answer, self.rank_by))
        scores_of: dict[str, list[float]] = defaultdict(list)
        for row in score_predictions(records, self.tasks).to_pylist():
            scores_of[row["task"]].append(row["score"])
        return {task: fmean(scores) for task, scores in sorted(scores_of.items())}


def prepare_online_evaluation(corpus: Corpus) -> OnlineEvaluation:
    """Prepares the online evaluation of the recipe's `evaluation.while_training`, the number of rows of each task.

    Raises `EvaluationError` if no held-out task has test rows that can be asked.
    """
    recipe = corpus.recipe
    tasks = [task for task in corpus.tasks if task.name in corpus.held_out and corpus.indices[task.name].test_source is not None]
    settings: dict[str, Any] = {"max_examples": recipe.evaluation.while_training, "templates_per_row": 1, "seed": recipe.seed}
    requests = [request for task in tasks for request in select_requests(task, corpus.indices[task.name].test, [0], **settings)]
    table = encode_questions(corpus, requests, corpus.layout, make_token_limits(recipe, local_folder(recipe.model.base)))
    questions = [question for question in table.to_pylist() if not question["dropped"]]
    if not questions:
        raise EvaluationError(
            "evaluation.while_training asks held-out tasks, and the recipe has none with test rows that can be asked; name some in"
            " data.hold_out, or leave it out."
        )
    return OnlineEvaluation(questions, tasks, make_answer_settings(recipe, corpus.layout), recipe.evaluation.rank_by)
