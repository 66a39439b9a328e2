"""A recipe by the Python API: a training that is stopped, and refused under another recipe; scores, replies and comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import apprentice
from tests.support.recipes import tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.long]  # CI runs the notebooks, which do as much


def test_a_training_is_stopped_from_python(tmp_path: Path, tiny_model: Path, ray_cluster: None) -> None:
    file = tiny_recipe(tmp_path, tiny_model, training__workers=1)
    stages: set[str] = set()
    training = apprentice.Recipe.load(file, "training.steps=400").train(progress=lambda stage, values: stages.add(stage))
    first = next(record for record in training.metrics() if "loss" in record)
    assert (first["step"], first["steps"]) == (1, 400)
    run = training.stop()
    assert "the same command goes on" in training.sentence
    assert 1 <= len(run.metrics_frame()) < 400
    assert stages == {"prepare", "train"}
    assert run.status()["state"] == "stopped"


def test_a_run_is_scored_asked_and_compared_from_python(tmp_path: Path, tiny_model: Path, ray_cluster: None) -> None:
    from apprentice import pipeline

    recipe = apprentice.Recipe.load(
        tiny_recipe(tmp_path, tiny_model, training__workers=1, evaluation__max_examples=2), "training.steps=2"
    )
    recipe = recipe.override("data.tasks=[headline_topics,message_moods]", "data.hold_out=[]")
    pipeline.train_run(recipe, progress=lambda stage, values: None)  # in this process, which is connected to the tests' Ray
    run = apprentice.Run.open("tiny", storage=recipe.storage)
    report = run.evaluate()
    assert report.content == run.last_report().content
    assert set(report.to_frame()["column"]) == {column.title for column in report.content.columns}
    assert "<table>" in report._repr_html_()
    assert apprentice.compare_runs([run, str(run.folder)], tmp_path / "both").folder == str(tmp_path / "both")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "Name a colour."}) + "\n")
    assert run.predict(rows, max_tokens=4)["rows"] == 1
