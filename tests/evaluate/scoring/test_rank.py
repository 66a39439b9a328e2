"""Which choice wins, and that no choice wins by numbers that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apprentice.data.corpus import Corpus
from apprentice.errors import EvaluationError
from apprentice.evaluate.questions.evaluation_subjects import make_answer_settings, make_token_limits
from apprentice.evaluate.questions.question_encoding import encode_questions
from apprentice.evaluate.questions.row_selection import select_requests
from apprentice.evaluate.scoring.answer_cache import AnswerCache
from apprentice.evaluate.scoring.rank import best_choice
from apprentice.evaluate.scoring.scorer import Scorer, make_blocks
from apprentice.inference.runners import causal
from apprentice.models.loading import load_model
from apprentice.storage import Folder
from tests.evaluate import tables

RECORD = {
    "task": "letters",
    "row": 7,
    "template": "plain",
    "choices": ["a", "bb", "c"],
    "choice_logprobs": [-2.0, -3.0, -9.0],
    "choice_tokens": [1, 2, 3],
    "choice_priors": [-1.0, -8.0, -4.0],
}
NAN = float("nan")


@pytest.mark.parametrize(("rank_by", "wins"), [("sum", "a"), ("mean", "bb"), ("pmi", "bb")])
def test_the_three_rankings(rank_by: str, wins: str) -> None:
    assert best_choice(RECORD, rank_by) == wins


@pytest.mark.parametrize("rank_by", ["sum", "mean", "pmi"])
@pytest.mark.parametrize("wrong", [[NAN] * 3, [-2.0, NAN, -9.0], [-2.0, float("inf"), -1.0], [-2.0, -float("inf"), -1.0]])
def test_numbers_that_are_not_finite_rank_nothing(rank_by: str, wrong: list[float]) -> None:
    with pytest.raises(EvaluationError, match=r"^letters row 7, wording plain: .*not finite.*: try model\.dtype"):
        best_choice(RECORD | {"choice_logprobs": wrong}, rank_by)


def test_a_prior_that_is_not_finite_ranks_nothing_either() -> None:
    assert best_choice(RECORD | {"choice_priors": [NAN] * 3}, "sum") == "a"  # which does not ask for it
    with pytest.raises(EvaluationError, match=r"^letters row 7"):
        best_choice(RECORD | {"choice_priors": [NAN] * 3}, "pmi")


@pytest.mark.parametrize("name", ["short_reviews", "written_dates"])
def test_a_model_of_nans_gets_no_score(corpus: Corpus, tiny_model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_model(tiny_model, torch.float32)
    size = causal.probe_model(model)
    monkeypatch.setattr(causal, "probe_model", lambda model: size)  # which would refuse a model that is never finite
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(NAN)
    [task] = [task for task in corpus.tasks if task.name == name]
    requests = select_requests(task, corpus.indices[name].test, [0], max_examples=3, templates_per_row=1, seed=1)
    questions = encode_questions(corpus, requests, corpus.layout, make_token_limits(corpus.recipe, tiny_model)).to_pylist()
    scorer = Scorer(lambda: model, "broken", make_answer_settings(corpus.recipe, corpus.layout))
    for block in make_blocks(list(enumerate(questions)), 1):
        [answer] = scorer(block).to_pylist()
        named = {f"{name} row {question['row']}, wording {question['template']}" for question in questions}
        assert answer["failure"].split(": ")[0] in named
        assert "not finite" in answer["failure"]


def test_such_answers_of_an_earlier_evaluation_are_asked_for_again(tmp_path: Path) -> None:
    answers = AnswerCache(Folder.at(tmp_path))
    record = tables.record("tuned", tables.TASKS[0], 0, "w0", "yes", key="k", choice_tokens=[1, 1])
    answers.add([record | {"choice_logprobs": [NAN, NAN]}])
    assert answers.find("k") is None
    assert AnswerCache(Folder.at(tmp_path)).find("k") is None
    answers.add([record])
    assert answers.find("k") is not None
