"""Scoring of one subject by a pool of workers: answers to its questions, and values that it gives to replies.

A model is loaded once by each worker of the pool; an endpoint is asked by a single worker. Answers are cached as they arrive.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from apprentice.errors import EvaluationError
from apprentice.evaluate.questions.evaluation_subjects import Subject, SubjectSettings
from apprentice.evaluate.scoring.answer_cache import ANSWER, AnswerCache, cache_key
from apprentice.evaluate.scoring.endpoint import EndpointScorer
from apprentice.evaluate.scoring.judge import ReplyQuestions
from apprentice.evaluate.scoring.rank import best_choice
from apprentice.evaluate.scoring.scorer import LEAST_TOGETHER, Scorer, make_blocks, with_prediction
from apprentice.model_pool.actors import map_tables
from apprentice.model_pool.model import load_worker_model, plan_pool
from apprentice.model_pool.pool import FreeResources, WorkerPool
from apprentice.recipe import Recipe

Progress = Callable[[dict[str, Any]], None]
Record = dict[str, Any]


@dataclass(frozen=True)
class SubjectScorer:
    """Asks one subject on the free `resources` of the cluster; `recipe.model` says how its model is loaded."""

    subject: Subject
    settings: SubjectSettings
    recipe: Recipe
    resources: FreeResources
    progress: Progress

    def without_priors(self) -> SubjectScorer:
        """The same subject, without the priors of choices."""
        answer_settings = replace(self.settings.answer_settings, priors=False)
        return replace(self, settings=replace(self.settings, answer_settings=answer_settings))

    def answer_questions(self, questions: Sequence[Record], answers: AnswerCache) -> list[Record]:
        """Records of all questions, each with its answer, cached or new, or with the reason why it has none."""
        name, rank_by = self.subject.name, self.recipe.evaluation.rank_by
        records = [self._with_cached_answer(question, answers) for question in questions]
        open_places = [place for place, record in enumerate(records) if not record["dropped"] and record["prediction"] is None]
        total = sum(not record["dropped"] for record in records)
        cached = total - len(open_places)
        if cached:
            self.progress({"message": f"{name}: {cached} of {total} answers were there already"})
        start, done = time.monotonic(), 0
        for block in self._answer_blocks([(place, questions[place]) for place in open_places]):
            for answer in block:
                records[answer["place"]] = with_prediction(records[answer["place"]], answer, rank_by)
            answers.add([records[answer["place"]] for answer in block])
            done += len(block)
            eta_s = (time.monotonic() - start) * (len(open_places) / done - 1)
            self.progress({"message": f"{name}: {cached + done} of {total} questions", "eta_s": eta_s})
        for record in records:  # cached answers may have been ranked by another rule
            if record["choice_logprobs"]:
                record["prediction"] = best_choice(record, rank_by)
        return records

    def value_replies(self, questions: ReplyQuestions) -> list[tuple[Record, float]]:
        """Each record with the value (reward or log-probability) that the subject gives to its reply as a choice, in order."""
        values: dict[int, list[float]] = {}
        for block in self._answer_blocks([(place, question) for place, (question, _) in enumerate(questions)]):
            values |= {answer["place"]: answer["choice_logprobs"] for answer in block}
        return [pair for place, (_, records) in enumerate(questions) for pair in zip(records, values[place], strict=True)]

    def _with_cached_answer(self, question: Record, answers: AnswerCache) -> Record:
        blank = dict.fromkeys(ANSWER) | {"unscored": "", "subject": self.subject.name, "key": None}
        record = {**question, **blank}
        if not record["dropped"] and self.settings.fingerprint is not None:
            record["key"] = cache_key(self.settings.fingerprint, record)
            record |= answers.find(record["key"]) or {}
        return record

    def _answer_blocks(self, questions: Sequence[tuple[int, Record]]) -> Iterator[list[Record]]:
        """Yields blocks of answers (`scorer.ANSWER_BLOCK`) to (place, question) pairs, as they arrive.

        Raises `EvaluationError` where a block could not be answered.
        """
        if not questions:
            return
        worker, arguments, pool = self._make_pool(questions)
        for table in map_tables(make_blocks(questions, pool.workers), worker, arguments, pool):
            block = table.to_pylist()
            if failure := next((answer["failure"] for answer in block if answer["failure"]), None):
                raise EvaluationError(f"{self.subject.name}: {failure}")
            yield block

    def _make_pool(self, questions: Sequence[tuple[int, Record]]) -> tuple[type, tuple[Any, ...], WorkerPool]:
        """Class of the workers, the arguments that they are built with, and the size of their pool."""
        subject, answer_settings = self.subject, self.settings.answer_settings
        if subject.endpoint is not None:
            self.progress({"message": f"{subject.name}: asking {subject.endpoint.url}"})
            return EndpointScorer, (subject.endpoint, answer_settings), WorkerPool(1, 1, 0)
        batches = math.ceil(len(questions) / LEAST_TOGETHER)
        pool, words = plan_pool(
            subject.folder, self.recipe.model.dtype, self.settings.engine, self.recipe.serving, self.resources, batches
        )
        self.progress({"message": f"{subject.name}: {words}"})
        longest = max(question["prompt_tokens"] + _answer_tokens(question, answer_settings.reply) for _, question in questions)
        load = partial(load_worker_model, subject.folder, self.recipe.model, pool, longest)
        return Scorer, (load, str(subject.folder), answer_settings), pool


def _answer_tokens(question: Record, reply: int) -> int:
    """Most tokens that follow the question's prompt: its longest choice, or `reply` where the answer is written."""
    return max(map(len, question["choice_ids"]), default=0) if question["choices"] else reply
