"""A reward model that is asked to write is refused with one sentence, whoever asks, and before it is loaded where that can be."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from apprentice import pipeline
from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import ModelError, RecipeError
from apprentice.evaluate.report.predictions import make_table
from apprentice.evaluate.scoring.scorer import QUESTION_BLOCK, Scorer
from apprentice.model_pool.answer_settings import AnswerSettings
from apprentice.model_pool.model import load_worker_model
from apprentice.model_pool.pool import WorkerPool
from apprentice.models.loading import load_model
from apprentice.preflight.check import run_check
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Model, Serving, load_recipe
from apprentice.serve import deployment
from tests.support.preferences import write_pairs
from tests.support.recipes import tiny_recipe

REFUSED = r"^\S+ is a reward model: it gives answers a number and writes none\. Score pairs of answers with `apprentice evaluate`"


@pytest.fixture
def rewarding(tiny_model: Path, tmp_path: Path) -> Path:
    """A model that gives answers a number."""
    folder = tmp_path / "rewarding"
    shutil.copytree(tiny_model, folder)
    model: Any = load_model(tiny_model, torch.float32, head=3)
    model.save_pretrained(folder)
    return folder


def test_as_a_base_that_goes_on_writing(rewarding: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=REFUSED):
        run_check("model", load_recipe(tiny_recipe(tmp_path, rewarding)))


def test_to_be_served(rewarding: Path) -> None:
    with pytest.raises(ModelError, match=REFUSED):
        deployment.check(rewarding, Serving(port=0), None)


def test_to_predict(rewarding: Path, tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text('{"instruction": "Name a colour."}\n')
    with pytest.raises(ModelError, match=REFUSED):
        pipeline.predict_file(
            str(rewarding),
            file,
            None,
            max_tokens=4,
            contract=None,
            recipe=None,
            restart=False,
            storage=str(tmp_path),
            progress=lambda stage, values: None,
        )
    assert not (tmp_path / "asked-replies").exists()


def test_to_be_scored_by_what_it_writes(rewarding: Path) -> None:
    question = {"place": 0, "prompt_ids": [5, 6, 7], "choices": [], "choice_ids": []}
    load = partial(load_worker_model, rewarding, Model(base=str(rewarding), dtype="float32"), WorkerPool(1, 1, 0), 0)
    scorer = Scorer(load, str(rewarding), AnswerSettings(Layout("chat", Tokenizer(rewarding)), 6))
    [answer] = scorer(make_table([question], QUESTION_BLOCK)).to_pylist()
    assert answer["failure"] == (
        f"{rewarding} is a reward model and writes nothing, but some tasks are scored by what is written; leave out those that"
        " have no choices."
    )


def test_a_recipe_that_would_have_one_scored_so(tiny_model: Path, tmp_path: Path) -> None:
    pairs = {"preferences": str(write_pairs(tmp_path / "pairs.jsonl"))}

    def looked(place: str) -> str:
        chosen = {"data__tasks": [pairs, place], "data__hold_out": [place], "data__formats": {}, "data__max_length": 96}
        return run_check("tasks", load_recipe(tiny_recipe(tmp_path, tiny_model, training__objective="reward", **chosen)))

    assert looked("sst2") == "2 tasks, 1 of them held out"
    with pytest.raises(RecipeError, match=r"^training\.objective reward makes a model that writes nothing, and task 'squad' is"):
        looked("squad")
