"""Preferences on the whole road: a DPO run through the command line to an answered request, and one whose worker is killed."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apprentice import cli, pipeline
from apprentice.data.reference import ReferenceLogProbs
from apprentice.data.stream import make_corpus
from apprentice.errors import ModelError
from apprentice.recipe import Recipe, load_recipe
from apprentice.run.folder import Run, open_run
from apprentice.storage import Folder
from apprentice.train.distributed import driver as launch
from tests.support.preferences import write_pairs
from tests.support.recipes import tiny_recipe
from tests.train.distributed.test_driver import dying, steps_of

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 4


def recipe_file(folder: Path, model: Path, **changes: Any) -> Path:
    file = write_pairs(folder / "pairs.jsonl")
    chosen: dict[str, Any] = {
        "data__tasks": [{"preferences": str(file), "test": str(file)}],
        "data__hold_out": [],
        "data__validation": 0.2,
        "data__formats": {},
        "data__max_length": 96,
        "data__packing": {"length": 256},
        "data__window": 16,
        "training__objective": "dpo",
        "training__steps": STEPS,
        "training__optimizer": {"learning_rate": 0.005, "schedule": "constant"},
    }
    return tiny_recipe(folder, model, **(chosen | changes))


@pytest.fixture(scope="module")
def trained(ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a DPO run that `apprentice train` made."""
    recipe = recipe_file(tmp_path_factory.mktemp("dpo"), tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["apprentice", "train", str(recipe)])
        with pytest.raises(SystemExit) as done:
            cli.main()
    assert not done.value.code
    return recipe.parent / "runs" / "tiny"


def test_the_pairs_are_learnt(trained: Path) -> None:
    steps = steps_of(Run(Folder.at(trained)))
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    # The model begins as its own reference, and then prefers the better answers more and more.
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert steps[0]["margin"] == pytest.approx(0.0, abs=1e-3)
    assert steps[-1]["loss"] < 0.99 * steps[0]["loss"]
    assert steps[-1]["margin"] == pytest.approx(steps[-1]["chosen_reward"] - steps[-1]["rejected_reward"], abs=1e-5)
    assert steps[-1]["accuracy"] > 0.7


def test_the_reference_is_kept_with_the_run(trained: Path) -> None:
    run = Run(Folder.at(trained))
    [file] = run.reference.children()
    reference = ReferenceLogProbs.read(file)
    assert reference.rows.tolist() == list(range(40))
    assert (reference.values < 0).all()
    assert len(np.unique(reference.values)) > 40
    identity = (run.folder / "identity.json").read_json()["keys"]
    assert identity["training.objective"] == "dpo"
    ledger = run.ledger_file.read_json()
    assert ledger["tasks"]["preferences_pairs"]["examples"] == sum(len(step["examples"]) for step in steps_of(run))


def test_it_answers_over_http(trained: Path) -> None:
    with pipeline.run_endpoint(str(trained), progress=lambda stage, values: None) as url:
        assert isinstance(pipeline.ask_endpoint(url, "Name a colour.", "", max_tokens=4), str)


def test_evaluation_ranks_held_out_pairs(trained: Path) -> None:
    report, _ = pipeline.evaluate_run(Run(Folder.at(trained)).recipe(), progress=lambda stage, values: None)
    [task] = report["tasks"]
    assert (task["task"], task["metrics"]) == ("preferences_pairs", ["accuracy", "length_bias"])
    base, tuned = (task["columns"][name] for name in ("base@0", "tuned@0"))
    assert base["questions"] == tuned["questions"] == 4
    assert tuned["score"] >= base["score"]


def test_a_reward_model_is_scored_and_never_asked_to_write(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, tiny_model, training__objective="reward", training__workers=1))
    result, run = fitted(recipe)
    steps = steps_of(run)
    assert result.steps == len(steps) == STEPS
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert not run.reference.exists()
    report, _ = pipeline.evaluate_run(recipe, progress=lambda stage, values: None)
    [task] = report["tasks"]
    assert task["columns"]["tuned@0"]["score"] == 100.0
    assert task["columns"]["tuned@0"]["metrics"]["length_bias"] == 0.0
    assert len(task["columns"]["tuned@0"]["interval"]) == 2
    with (
        pytest.raises(ModelError, match="is a reward model: it gives answers a number and writes none"),
        pipeline.run_endpoint(str(run.folder), progress=lambda stage, values: None),
    ):
        pytest.fail("it is served")


def fitted(recipe: Recipe) -> tuple[launch.TrainResult, Run]:
    run = open_run(recipe)
    return launch.train(recipe, run, make_corpus(recipe, run), progress=lambda values: None), run


def test_a_killed_worker_changes_nothing(trained: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {step["step"]: step for step in steps_of(Run(Folder.at(trained)))}
    monkeypatch.setattr(launch, "work", dying(tmp_path / "died", STEPS))
    result, run = fitted(load_recipe(recipe_file(tmp_path, tiny_model, training__max_failures=1)))
    assert (tmp_path / "died").exists()
    assert result.restarts == 1
    steps = steps_of(run)
    assert [step["step"] for step in steps] == [1, 2, 3, 3, 4]
    for step in steps:
        assert step["examples"] == expected[step["step"]]["examples"] != []
        for name in ("loss", "margin", "chosen_reward"):
            assert step[name] == pytest.approx(expected[step["step"]][name], rel=1e-5, abs=1e-6)
