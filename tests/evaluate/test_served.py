"""What is served is what was scored: our own endpoint, asked through HTTP, gives the answers of the model in memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apprentice.data.contract import make_contract
from apprentice.data.corpus import Corpus
from apprentice.evaluate import predictions
from apprentice.evaluate.endpoint import Endpoint, model_at
from apprentice.evaluate.launch import Subject, evaluate
from apprentice.recipe import Recipe, Serving
from apprentice.serve.deployment import start
from apprentice.storage import Folder

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

QUESTIONS = 4 * 5 * 2 * 2  # tasks, rows, wordings, numbers of exemplars


@pytest.fixture(scope="module")
def model(tiny_model: Path, recipe: Recipe, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("served") / "model")
    make_contract(recipe, corpus.layout, folder).write(folder)
    return folder


@pytest.fixture(scope="module")
def url(ray_cluster: None, model: Path) -> Iterator[str]:
    serving = Serving(port=0, max_running=8, max_queued_requests=64, context=1024)
    with start(model, serving, model_name="tiny", dtype="float32", cpus=1) as running:
        yield running.url


def test_the_endpoint_answers_as_the_model_in_memory(recipe: Recipe, corpus: Corpus, model: Path, url: str, tmp_path: Path) -> None:
    assert model_at(url) == "tiny"
    subjects = [Subject("local", model, (0, 2)), Subject("served", model, (0, 2), Endpoint(url, "tiny"))]
    report = evaluate(recipe, corpus, subjects, Folder.at(tmp_path), progress=lambda values: None)
    assert report["unscored"] == []

    answers: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {"local": {}, "served": {}}
    for record in predictions.read(Folder.at(tmp_path)).to_pylist():
        if record["subject"] in answers:
            question = record["task"], record["row"], record["template"], record["shots"]
            answers[record["subject"]][question] = record
    assert len(answers["local"]) == QUESTIONS
    assert answers["local"].keys() == answers["served"].keys()
    ranked = generated = 0
    for question, local in answers["local"].items():
        served = answers["served"][question]
        assert served["prompt"] == local["prompt"]
        if local["choices"]:
            assert served["choice_logprobs"] == pytest.approx(local["choice_logprobs"], abs=1e-3)
            ranked += 1
        else:
            generated += 1
        assert served["prediction"] == local["prediction"], question
    assert (ranked, generated) == (40, 40)
    for task in report["tasks"]:
        assert task["columns"]["served@0"]["score"] == task["columns"]["local@0"]["score"]
        assert task["differences"]["served@0"]["mean"] == 0.0


def test_a_refusal_is_listed_and_the_rest_is_kept(recipe: Recipe, corpus: Corpus, model: Path, url: str, tmp_path: Path) -> None:
    """Every question that the endpoint refuses is listed with the reason that it gave."""
    subjects = [Subject("local", model), Subject("served", model, (0,), Endpoint(url, "another"))]
    report = evaluate(recipe, corpus, subjects, Folder.at(tmp_path), progress=lambda values: None)
    assert len(report["unscored"]) == QUESTIONS / 2
    assert {lost["subject"] for lost in report["unscored"]} == {"served"}
    assert "404" in report["unscored"][0]["reason"]
    assert all(task["columns"]["local@0"]["score"] is not None for task in report["tasks"])
