"""Runs of all objectives with data of their own, killed and begun again in one process: the same steps and weights, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing

from tests.support import one_process
from tests.support.preferences import labelled, pairs, write_pairs
from tests.support.recipes import tiny_recipe

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"method": "lora", "rank": 4, "dropout": 0.1}),
    "reward": ("reward", {"method": "lora", "rank": 4, "dropout": 0.1}),
    "reward-full": ("reward", {"method": "full"}),
    "orpo": ("orpo", {"method": "lora", "rank": 4}),
    "kto": ("kto", {"method": "lora", "rank": 4, "dropout": 0.1}),
    "distill": ("distill", {"method": "lora", "rank": 4, "dropout": 0.1}),
}
FIGURES = ("loss", "grad_norm", "learning_rate", "margin", "accuracy", "chosen_reward", "examples", "tokens")


@pytest.fixture(scope="module")
def outcomes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each case came to, in one process for all: to start it takes longer than a case."""
    folder = tmp_path_factory.mktemp("resuming")
    paired, answers = write_pairs(folder / "pairs.jsonl"), write_pairs(folder / "answers.jsonl", labelled())
    records = [{"instruction": pair["prompt"], "input": "", "output": pair["chosen"]} for pair in pairs()]
    sources = {"kto": {"unpaired": str(answers)}, "distill": {"alpaca": str(write_pairs(folder / "records.jsonl", records))}}
    distill = {"training__distill": {"teacher": str(tiny_model), "top": 4}}
    files = {}
    for name, (objective, tuning) in CASES.items():
        place = folder / name
        place.mkdir()
        recipe = tiny_recipe(
            place,
            tiny_model,
            data__tasks=[sources.get(objective, {"preferences": str(paired)})],
            data__hold_out=[],
            data__validation=0.2,
            data__formats={},
            data__max_length=96,
            data__window=16,
            tuning=tuning,
            training__objective=objective,
            training__workers=1,
            training__steps=5,
            training__global_batch=2,
            **(distill if objective == "distill" else {}),
        )
        files[name] = [str(recipe), []]
    torch.multiprocessing.spawn(one_process.process, (str(folder), files, one_process.gone_on), nprocs=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_ends_as_if_it_had_not_been(name: str, outcomes: Path) -> None:
    seen = json.loads((outcomes / f"{name}.json").read_text())
    assert "error" not in seen, seen["error"]
    whole, before, after = ([step for step in seen[part] if "loss" in step] for part in ("whole", "before", "after"))
    assert [[step["step"] for step in steps] for steps in (whole, before, after)] == [[1, 2, 3, 4, 5], [1, 2, 3], [3, 4, 5]]
    for step in before + after:
        undisturbed = whole[step["step"] - 1]
        assert {figure: step.get(figure) for figure in FIGURES} == {figure: undisturbed.get(figure) for figure in FIGURES}
        assert step.keys() >= set(FIGURES[:3])
    assert len({step["loss"] for step in whole}) == 5
    validated = [step["validation_loss"] for step in seen["whole"] if "validation_loss" in step]
    assert validated[-1] == [step["validation_loss"] for step in seen["after"] if "validation_loss" in step][-1]
    sampled = [record for record in seen["before"] + seen["after"] if "samples" in record]
    assert [record["step"] for record in sampled] == ([] if name.startswith("reward") else [2, 4])
    assert all(len(record["samples"]) == 3 and record["samples"][0]["instruction"] for record in sampled)
    assert seen["tensors"] > 3
    assert seen["differ"] == []
