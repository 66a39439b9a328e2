"""Answers are kept as they come and found again by what was asked."""

from __future__ import annotations

from pathlib import Path

from apprentice.evaluate.report import predictions
from apprentice.evaluate.scoring.answer_cache import AnswerCache, cache_key
from apprentice.storage import Folder
from tests.evaluate import tables

QUESTION = {"prompt_ids": [1, 2], "choice_ids": [[3], [4, 5]]}


def test_keys_differ_where_model_or_question_does() -> None:
    keys = {
        cache_key("m", QUESTION),
        cache_key("n", QUESTION),
        cache_key("m", QUESTION | {"prompt_ids": [1, 2, 3]}),
        cache_key("m", QUESTION | {"choice_ids": [[3], [4]]}),
        cache_key("m", QUESTION | {"choice_ids": None}),
    }
    assert len(keys) == 5
    assert cache_key("m", QUESTION) == cache_key("m", dict(QUESTION))


def answered(row: int, prediction: str | None = "yes", **more: object) -> dict:
    return tables.record("tuned", tables.TASKS[0], row, "w0", prediction, key=f"k{row}", choice_tokens=[1, 1], **more)


def test_parts_are_found_by_the_next_process(tmp_path: Path) -> None:
    first = AnswerCache(Folder.at(tmp_path))
    first.add([answered(0), answered(1)])
    first.add([answered(2, None, unscored="no answer")])
    assert len(list((tmp_path / "parts").iterdir())) == 2
    again = AnswerCache(Folder.at(tmp_path))
    assert len(again) == 2  # what has no answer is asked again
    assert again.find("k1") == {
        "prediction": "yes",
        "choice_logprobs": [-1.0, -2.0],
        "choice_tokens": [1, 1],
        "choice_priors": None,
    }
    assert again.find("k2") is None
    again.add([answered(2)])
    assert len(list((tmp_path / "parts").iterdir())) == 3  # no part is written over


def test_a_finished_table_serves_too_and_parts_go(tmp_path: Path) -> None:
    answers = AnswerCache(Folder.at(tmp_path / "a"))
    answers.add([answered(0)])
    predictions.save(predictions.score_predictions([answered(0)], tables.TASKS), Folder.at(tmp_path / "a"))
    answers.close()
    assert [path.name for path in (tmp_path / "a").iterdir()] == [predictions.FILE]
    assert AnswerCache(Folder.at(tmp_path / "a")).find("k0") is not None
    assert AnswerCache(Folder.at(tmp_path / "b"), [Folder.at(tmp_path / "a")]).find("k0") is not None
