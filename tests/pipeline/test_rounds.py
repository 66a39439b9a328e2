"""InstructGPT's chain on the whole road: demonstrations, a reward model, rounds of replies; and a round whose worker is killed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from apprentice import pipeline
from apprentice.data.stream import make_corpus
from apprentice.jobs import stages as jobs
from apprentice.recipe import load_recipe
from apprentice.run.contract import read_contract
from apprentice.run.folder import Run, open_run
from apprentice.storage import Folder
from apprentice.train.checkpoint import format as checkpoints
from apprentice.train.checkpoint.shard_reader import open_tensors
from apprentice.train.distributed import driver as launch
from tests.support.on_policy import round_recipe
from tests.support.preferences import write_pairs
from tests.support.recipes import tiny_recipe
from tests.train.distributed.test_driver import dying, steps_of

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def chain(ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three runs that one job made: `demonstrations`, `reward` and `rounds`, which goes on from the first."""
    folder = tmp_path_factory.mktemp("instructgpt")
    pairs = {"data__tasks": [{"preferences": str(write_pairs(folder / "pairs.jsonl"))}], "data__hold_out": [], "data__formats": {}}
    short = pairs | {"data__max_length": 96, "training__workers": 1, "storage": str(folder / "runs")}
    (folder / "first").mkdir()
    (folder / "second").mkdir()
    (folder / "third").mkdir()
    files = [
        tiny_recipe(folder / "first", tiny_model, name="demonstrations", **short),
        tiny_recipe(
            folder / "second", tiny_model, name="reward", model__base="run:demonstrations", training__objective="reward", **short
        ),
        recipe_of_rounds(folder, folder / "third"),
    ]
    jobs.run_job("train", [word for file in files for word in ("--recipe", str(file))])
    return folder


def recipe_of_rounds(chain: Path, folder: Path, **changes: Any) -> Path:
    named: dict[str, Any] = {"model__base": "run:demonstrations", "training__grpo__reward": "run:reward", "name": "rounds"}
    return round_recipe(folder, Path(), storage=str(chain / "runs"), **(named | changes))


def test_the_chain_ends_in_a_model_that_answers(chain: Path) -> None:
    run = Run(Folder.at(chain / "runs" / "rounds"))
    contract = read_contract(run.model.local)
    assert contract is not None
    assert contract.ancestors[-1] == "run:demonstrations"
    reward = read_contract(chain / "runs" / "reward" / "model")
    assert reward is not None
    named = (run.folder / "identity.json").read_json()["keys"]["training.grpo.reward"]
    assert named == f"run:reward@{reward.weights_sha256[:16]}"
    with pipeline.run_endpoint(str(run.folder), progress=lambda stage, values: None) as url:
        assert isinstance(pipeline.ask_endpoint(url, "Name a colour.", "", max_tokens=4), str)


def test_every_step_says_what_the_replies_were_worth(chain: Path) -> None:
    steps = steps_of(Run(Folder.at(chain / "runs" / "rounds")))
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-5)  # the policy begins as its reference
    assert steps[-1]["kl"] > steps[0]["kl"]
    for step in steps:
        assert len(step["examples"]) == 16  # of 32 replies in two steps
        assert math.isfinite(step["reward"])
        assert 0 < step["reply_tokens"] <= 8
    assert {position for step in steps[:2] for position in step["examples"]} == set(range(8))
    assert {position for step in steps[2:] for position in step["examples"]} == set(range(8, 16))


def test_rounds_lie_in_the_run(chain: Path) -> None:
    run = Run(Folder.at(chain / "runs" / "rounds"))
    assert sorted(file.name for file in run.rounds.children()) == ["000000-0.parquet", "000001-0.parquet"]
    table = pq.read_table((run.rounds / "000001-0.parquet").local)
    rewards = [reward for row in table["rewards"].to_pylist() for reward in row]
    assert len(rewards) == 32
    steps = steps_of(run)
    assert sum(step["reward"] for step in steps[2:]) / 2 == pytest.approx(sum(rewards) / 32, rel=1e-4)


def test_a_killed_worker_goes_on_with_the_replies_that_are_there(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second round, whose replies are written already: they are not written again, and need no checkpoint."""
    monkeypatch.setattr(launch, "work", dying(tmp_path / "died", 4))
    (tmp_path / "recipe").mkdir()
    made = load_recipe(
        recipe_of_rounds(
            chain, tmp_path / "recipe", name="killed", training__checkpoint={"every_steps": 4}, training__max_failures=1
        )
    )
    run = open_run(made)
    result = launch.train(made, run, make_corpus(made, run), progress=lambda values: None)
    assert (tmp_path / "died").exists()
    assert result.restarts == 1
    steps, undisturbed = steps_of(run), {step["step"]: step for step in steps_of(Run(Folder.at(chain / "runs" / "rounds")))}
    assert [step["step"] for step in steps] == [1, 2, 3, 1, 2, 3, 4]
    snapshot = checkpoints.find_weights(run.checkpoints, 2)
    assert snapshot is not None
    assert [child.name for child in run.checkpoints.children() if child.name.startswith("weights-")] == [snapshot.folder.name]
    with open_tensors(snapshot) as reader:
        assert {key.partition("/")[0] for key in reader.shapes} == {"weight"}
    for step in steps:
        assert step["examples"] == undisturbed[step["step"]]["examples"]
        for name in ("loss", "reward", "kl"):
            assert step[name] == pytest.approx(undisturbed[step["step"]][name], rel=1e-4, abs=1e-5)
    for key, (one, other) in weights(run, Run(Folder.at(chain / "runs" / "rounds"))).items():
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.long
def test_stale_rounds_go_on_after_a_kill_as_if_nothing_had_been(
    ray_cluster: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds, each written by the weights before the round before it; killed in the second; a checkpoint a round."""
    shape: dict[str, Any] = {
        "training__grpo__reward": {"function": "regex", "pattern": "[^e]*"},
        "training__grpo__staleness": 1,
        "training__steps": 6,
        "training__max_failures": 1,
        "training__checkpoint": {"every_steps": 2, "keep": 1},
    }
    runs = []
    for name in ("undisturbed", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "killed":
            monkeypatch.setattr(launch, "work", dying(tmp_path / "died", 4))
        made = load_recipe(round_recipe(folder, tiny_model, name=name, **shape))
        runs.append(open_run(made))
        result = launch.train(made, runs[-1], make_corpus(made, runs[-1]), progress=lambda values: None)
        assert result.restarts == (name == "killed")
    undisturbed, killed = ({step["step"]: step for step in steps_of(run)} for run in runs)
    assert len(undisturbed) == len(killed) == 6
    for number, step in undisturbed.items():
        assert killed[number]["examples"] == step["examples"]
        for figure in ("loss", "reward", "clipped", "reply_tokens"):
            assert killed[number][figure] == pytest.approx(step[figure], rel=1e-4, abs=1e-5)
    first, second, third = (replies_in(runs[0], window) for window in range(3))
    assert [replies_in(runs[1], window) for window in range(3)] == [first, second, third]
    for key, (one, other) in weights(*runs).items():
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=key)


def replies_in(run: Run, window: int) -> list[list[int]]:
    """The token ids of a round's rows."""
    column = pq.read_table((run.rounds / f"{window:06d}-0.parquet").local)["input_ids"]
    return [list(ids) for ids in column.to_pylist()]


def weights(*runs: Run) -> dict[str, list[torch.Tensor]]:
    """Key → the tensors of the last checkpoint of each run."""
    tensors: dict[str, list[torch.Tensor]] = {}
    for run in runs:
        last = checkpoints.find_newest(run.checkpoints)
        assert last is not None
        with open_tensors(last) as reader:
            for key in reader.shapes:
                tensors.setdefault(key, []).append(reader.read(key))
    return tensors
