"""Scoring worker: answers blocks of questions with a model in memory. A plain class that Ray Data can call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa

from apprentice.errors import ApprenticeError, EvaluationError
from apprentice.evaluate.report.predictions import ENCODED_QUESTION, make_table
from apprentice.evaluate.scoring.rank import best_choice, check_finite, score_priors
from apprentice.model_pool.answer_settings import AnswerSettings
from apprentice.model_pool.generate import generate_replies, score_choices
from apprentice.models.reward import choice_rewards, is_reward

LEAST_TOGETHER, MOST_TOGETHER = 16, 64  # questions in a block: enough for a batch, few enough to spread over workers
QUESTION_BLOCK = pa.schema([("place", pa.int64()), *ENCODED_QUESTION])  # place: index of the question in the list of its subject
ANSWER_BLOCK = pa.schema(
    [
        ("place", pa.int64()),
        ("prediction", pa.string()),  # of generated questions
        ("choice_logprobs", pa.list_(pa.float64())),
        ("choice_priors", pa.list_(pa.float64())),
        ("unscored", pa.string()),  # why this question has no answer
        ("failure", pa.string()),  # why the whole block could not be answered; then it is the only line
    ]
)


class Scorer:
    """Answers blocks of questions with the model that `load` returns, called at the first block; errors name it `name`.

    An `ApprenticeError` becomes a `failure` in the answer instead of an exception, which Ray would print with all its stacks.
    """

    def __init__(self, load: Callable[[], Any], name: str, answer_settings: AnswerSettings) -> None:
        self._load, self._name, self._answer_settings = load, name, answer_settings

    def __call__(self, block: pa.Table) -> pa.Table:
        """Answers a block of the schema `QUESTION_BLOCK`, all of it ranked or all generated; returns one of `ANSWER_BLOCK`."""
        questions = block.to_pylist()
        try:
            answers = self._score_choices(questions) if questions[0]["choices"] else self._generate(questions)
        except ApprenticeError as error:
            return pa.Table.from_pylist([{"failure": str(error)}], schema=ANSWER_BLOCK)
        rows = [{"place": question["place"], **answer} for question, answer in zip(questions, answers, strict=True)]
        return pa.Table.from_pylist(rows, schema=ANSWER_BLOCK)

    def _score_choices(self, questions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        choices = [question["choice_ids"] for question in questions]
        scores = choice_rewards if is_reward(self._model) else score_choices
        sums = scores(self._model, [question["prompt_ids"] for question in questions], choices)
        for question, values in zip(questions, sums, strict=True):
            check_finite(question, values)
        if not self._answer_settings.priors:
            return [{"choice_logprobs": values} for values in sums]
        empty = self._answer_settings.empty_prompt
        priors = score_priors(questions, lambda lists: score_choices(self._model, [empty] * len(lists), lists))
        return [{"choice_logprobs": values, "choice_priors": prior} for values, prior in zip(sums, priors, strict=True)]

    def _generate(self, questions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        if is_reward(self._model):
            raise EvaluationError(
                f"{self._name} is a reward model and writes nothing, but some tasks are scored by what is written; leave out"
                " those that have no choices."
            )
        return generate_replies(self._model, questions, self._answer_settings)

    @cached_property
    def _model(self) -> Any:
        return self._load()


def make_blocks(questions: Sequence[tuple[int, Mapping[str, Any]]], workers: int) -> list[pa.Table]:
    """Splits (place, question) pairs into blocks of one kind (generated or ranked) and similar prompt length, longest first.

    A block has 16 to 64 questions, or fewer at the end; within these limits there are two or more blocks for each worker.
    """
    tables = []
    for is_ranked in (False, True):
        chosen = [{"place": place, **question} for place, question in questions if bool(question["choices"]) is is_ranked]
        chosen.sort(key=lambda question: (-question["prompt_tokens"], question["place"]))
        size = min(MOST_TOGETHER, max(LEAST_TOGETHER, math.ceil(len(chosen) / (2 * workers))))
        tables += [make_table(chosen[start : start + size], QUESTION_BLOCK) for start in range(0, len(chosen), size)]
    return tables


def with_prediction(record: Mapping[str, Any], answer: Mapping[str, Any], rank_by: str) -> dict[str, Any]:
    """Record of a question with the fields of its answer (`ANSWER_BLOCK`); the prediction of a ranked one is its best choice."""
    fields = {name: answer[name] for name in ("prediction", "choice_logprobs", "choice_priors")}
    fields["unscored"] = answer["unscored"] or ""
    if answer["choice_logprobs"]:
        fields["choice_tokens"] = [len(ids) for ids in record["choice_ids"]]
        fields["prediction"] = best_choice({**record, **fields}, rank_by)
    return {**record, **fields}
