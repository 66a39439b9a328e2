"""QLoRA on CPUs: over a base in 4 bits the loss falls, only adapters are trained, and a run goes on exactly from its state."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from apprentice.recipe import load_recipe
from apprentice.train.memory.estimate import estimate_memory
from apprentice.train.memory.model_size import measure_model_size
from tests.support.recipes import tiny_recipe
from tests.train import four_bit_training

PACKAGES = Path(sys.prefix) / "qlora"  # `make setup-dev` puts bitsandbytes here, out of sight of other tests
IS_INSTALLED = importlib.util.find_spec("bitsandbytes") is not None or (PACKAGES / "bitsandbytes").is_dir()
STAGES, WORKERS = (0, 2), 2


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A recipe for each of `STAGES`."""
    folder = tmp_path_factory.mktemp("four_bit")
    model = four_bit_training.save_model(folder / "model")
    places = [folder / str(stage) for stage in STAGES]
    for place in places:
        place.mkdir()
    return [
        tiny_recipe(place, model, tuning={"method": "qlora", "rank": 4}, training__deepspeed={"stage": stage})
        for place, stage in zip(places, STAGES, strict=True)
    ]


@pytest.fixture(scope="module")
def results(recipes: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes made of each recipe, in one start of both."""
    folder = tmp_path_factory.mktemp("group")
    arguments = (WORKERS, str(folder), str(PACKAGES), [str(recipe) for recipe in recipes])
    torch.multiprocessing.spawn(four_bit_training.process, arguments, nprocs=WORKERS)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(not IS_INSTALLED, reason="needs bitsandbytes: make setup-dev, or the extra qlora")
def test_a_base_in_4_bits_is_trained_through_its_adapters(recipes: list[Path], results: list[dict[str, Any]]) -> None:
    """A validation after each step changes nothing, neither the weights nor what the next step computes."""
    for file, seen in zip(recipes, results, strict=True):
        assert seen["losses"][-1] < seen["losses"][0] - 0.3
        assert seen["losses"][4] < seen["losses"][2] < seen["losses"][0]  # of the same rows
        assert len(seen["trained"]) == 2 * 2 * 7  # layers, matrices, projections
        assert all("lora_" in name for name in seen["trained"])
        assert seen["moved"] == []
        assert seen["repacks"] == [False] * 14
        assert seen["rest"] == seen["losses"][len(seen["losses"]) // 2 :]
        assert seen["differ"] == []
        recipe = load_recipe(file)
        size = measure_model_size(recipe, torch.float32)
        expected = estimate_memory(recipe, size.parameters, seen["numbers"], torch.float32, WORKERS, quantized=size.quantized)
        assert seen["bytes"] == pytest.approx(expected.weights, rel=0.01)
        assert seen["numbers"] == size.trained
    unsplit, split = results
    assert split["losses"] == pytest.approx(unsplit["losses"], abs=1e-5)
    assert split["validations"] == pytest.approx(unsplit["validations"], abs=1e-5)
