"""Online evaluation on the held-out tasks says what a whole evaluation says of the same rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apprentice.data.corpus import Corpus
from apprentice.errors import EvaluationError
from apprentice.evaluate.online import prepare_online_evaluation
from apprentice.evaluate.questions.row_selection import select_requests
from apprentice.evaluate.stats.metrics import METRICS
from apprentice.inference.choices.choice_scoring import choice_logprobs
from apprentice.models.loading import load_model


def scored_while_training(corpus: Corpus, **more: Any) -> Corpus:
    evaluation = corpus.recipe.evaluation.model_copy(update={"while_training": 6, **more})
    return replace(corpus, recipe=corpus.recipe.model_copy(update={"evaluation": evaluation}))


def test_scores_are_those_of_the_model(corpus: Corpus, tiny_model: Path) -> None:
    model: Any = load_model(tiny_model, torch.float32)
    evaluation = prepare_online_evaluation(scored_while_training(corpus))
    assert {question["task"] for question in evaluation.questions} == {"short_reviews"}  # of the cluster held out
    [task] = evaluation.tasks
    drawn = select_requests(task, corpus.indices[task.name].test, [0], max_examples=6, templates_per_row=1, seed=corpus.recipe.seed)
    assert sorted(question["row"] for question in evaluation.questions) == sorted(request.row for request in drawn)
    expected = []
    for question in evaluation.questions:
        [sums] = choice_logprobs(model, [question["prompt_ids"]], [question["choice_ids"]])
        prediction = question["choices"][max(range(len(sums)), key=lambda place: sums[place])]
        expected.append(METRICS[task.metrics[0]].score_one(prediction, question["references"], question["choices"]))
    assert evaluation(model) == {"short_reviews": pytest.approx(sum(expected) / len(expected))}


def test_without_held_out_tasks(corpus: Corpus) -> None:
    with pytest.raises(EvaluationError, match=r"^evaluation\.while_training asks held-out tasks, and the recipe has none"):
        prepare_online_evaluation(replace(scored_while_training(corpus), held_out=frozenset()))
