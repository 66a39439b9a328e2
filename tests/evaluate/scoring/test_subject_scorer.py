"""One subject scored in this process: answers come once, later from the cache; a failure is one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from apprentice.data.corpus import Corpus
from apprentice.errors import EvaluationError
from apprentice.evaluate.questions.evaluation_subjects import Subject, make_subject_settings
from apprentice.evaluate.questions.question_encoding import encode_questions
from apprentice.evaluate.questions.row_selection import select_requests
from apprentice.evaluate.scoring import subject_scorer
from apprentice.evaluate.scoring.answer_cache import AnswerCache
from apprentice.evaluate.scoring.judge import group_replies, likelihood_questions
from apprentice.evaluate.scoring.subject_scorer import SubjectScorer
from apprentice.model_pool.pool import FreeResources, WorkerPool
from apprentice.storage import Folder


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Workers run in this process; gives the names of those that were made."""
    folders: list[str] = []

    def map_tables(tables: Sequence[pa.Table], worker: type, arguments: tuple[Any, ...], pool: WorkerPool) -> Iterator[pa.Table]:
        folders.append(worker.__name__)
        one = worker(*arguments)
        return (one(table) for table in tables)

    monkeypatch.setattr(subject_scorer, "map_tables", map_tables)
    return folders


def scorer_of(corpus: Corpus, folder: Path, messages: list[str]) -> SubjectScorer:
    subject = Subject("base", folder)
    settings = make_subject_settings(subject, corpus.recipe, corpus)
    resources = FreeResources(1, 1, 0, 1 << 34)
    return SubjectScorer(subject, settings, corpus.recipe, resources, lambda values: messages.append(values["message"]))


def questions_of(corpus: Corpus, scorer: SubjectScorer) -> list[dict[str, Any]]:
    requests = [
        request
        for task in corpus.tasks
        for request in select_requests(task, corpus.indices[task.name].test, [0], max_examples=2, templates_per_row=1, seed=1)
    ]
    questions: list[dict[str, Any]] = encode_questions(
        corpus, requests, scorer.settings.answer_settings.layout, scorer.settings.limits
    ).to_pylist()
    return questions


def test_answers_come_once(corpus: Corpus, tiny_model: Path, tmp_path: Path, loads: list[str]) -> None:
    messages: list[str] = []
    scorer = scorer_of(corpus, tiny_model, messages)
    questions = questions_of(corpus, scorer)
    first = scorer.answer_questions(questions, AnswerCache(Folder.at(tmp_path)))
    assert loads == ["Scorer"]
    assert [record["task"] for record in first] == [question["task"] for question in questions]
    assert all((record["prediction"] is None) is bool(record["dropped"]) for record in first)
    assert (messages[0], messages[-1]) == ("base: loading on 1 worker", "base: 8 of 8 questions")
    again = scorer.answer_questions(questions, AnswerCache(Folder.at(tmp_path)))
    assert loads == ["Scorer"]
    assert messages[-1] == "base: 8 of 8 answers were there already"
    assert again == first


def test_replies_are_valued_in_order(corpus: Corpus, tiny_model: Path, tmp_path: Path) -> None:
    scorer = scorer_of(corpus, tiny_model, []).without_priors()
    questions = questions_of(corpus, scorer)
    records = scorer.answer_questions(questions, AnswerCache(Folder.at(tmp_path)))
    replies = likelihood_questions(questions, group_replies(records), "base", corpus.layout)
    values = scorer.value_replies(replies)
    assert [record for record, _ in values] == [record for _, own in replies for record in own]
    assert all(value < 0 for _, value in values)


def test_a_failure_names_the_subject(corpus: Corpus, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_of(corpus, tiny_model, [])

    def broken(*_: Any) -> Any:
        raise EvaluationError("it is broken")

    monkeypatch.setattr(subject_scorer, "load_worker_model", broken)
    with pytest.raises(EvaluationError, match=r"^base: it is broken$"):
        scorer.answer_questions(questions_of(corpus, scorer), AnswerCache(Folder.at(tmp_path)))
