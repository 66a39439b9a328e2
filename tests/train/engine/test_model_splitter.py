"""Split loading in two gloo processes: each has half of every parameter, and all else is as with a model that is loaded whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

from apprentice.errors import ModelError
from apprentice.recipe import Training
from apprentice.train.engine import compat
from apprentice.train.engine.collectives import Collectives
from apprentice.train.engine.deepspeed_config import LARGEST_BUCKET
from apprentice.train.engine.model_splitter import create_splitter, find_loading_obstacle, find_stage_obstacle
from tests.models.architectures import made
from tests.train.engine import split_loading

WORKERS = 2
CASES: dict[str, dict[str, Any]] = {
    "llama-full": {"model": "llama", "dtype": "bfloat16", "trains": True},
    "llama-lora": {"model": "llama", "method": "lora", "dtype": "bfloat16", "trains": True},
    "gpt2-lora": {"model": "gpt2", "method": "lora"},
    "qwen3-adapter": {"model": "qwen3", "method": "adapter"},
    "t5-full": {"model": "t5", "pairs": True, "trains": True},
    "t5-lora": {"model": "t5_v1.1", "method": "lora", "pairs": True},
    "reward-full": {"model": "llama", "head": True},
    "reward-lora": {"model": "qwen2", "head": True, "method": "lora", "trains": True},
    "llama-prefix": {"model": "llama", "method": "prefix", "trains": True},
    "llama-prompt": {"model": "llama", "method": "prompt"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The results of all cases: starting processes takes longer than a case."""
    os.environ["OMP_NUM_THREADS"] = "1"
    place = tmp_path_factory.mktemp("group")
    cases = []
    for case in CASES.values():
        if not (place / case["model"]).is_dir():
            made(case["model"]).save_pretrained(place / case["model"])
        cases.append({"method": "full", "dtype": "float32", "trains": False} | case | {"base": str(place / case["model"])})
    torch.multiprocessing.spawn(split_loading.process, (WORKERS, str(place), cases), nprocs=WORKERS)
    listed = torch.load(place / "results.pt", weights_only=False)
    return {name: result | {"file": bytes_in_file(case)} for name, result, case in zip(CASES, listed, cases, strict=True)}


def bytes_in_file(case: dict[str, Any]) -> int:
    """Bytes of the numbers in the file that the model of `case` has; a reward model has no output layer over words."""
    weights = load_file(Path(case["base"]) / "model.safetensors")
    return sum(value.nbytes for name, value in weights.items() if not (case.get("head") and name == "lm_head.weight"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_process_has_its_share_and_the_same_values(results: dict[str, dict[str, Any]], name: str) -> None:
    result = results[name]
    assert result["shares"]
    assert result["different"] == []
    assert result["same_names"]
    assert result["same_trained"]
    assert result["buffers"]
    assert result["bytes"] == result["file"]  # all processes together read each byte once


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.get("trains")])
def test_training_and_resuming_are_the_same_to_the_bit(results: dict[str, dict[str, Any]], name: str) -> None:
    result = results[name]
    assert result["loss"] > 0
    assert (result["first"], result["second"], result["share_of_numbers"], result["state"]) == (True, True, True, True)
    assert result["resumed"]


def training(**deepspeed: Any) -> Training:
    return Training.model_validate({"steps": 1, "deepspeed": {"stage": 3, **deepspeed}})


def test_what_is_loaded_whole_at_stage_3(tiny_model: Path) -> None:
    assert find_stage_obstacle(training()) is None
    nvme = training(offload="nvme", offload_parameters="nvme", nvme_path="/disk")
    assert find_stage_obstacle(nvme) == "its parameters go to disks (training.deepspeed.offload_parameters nvme)"
    zero = {"zero_hpz_partition_size": 4}
    obstacle = "training.deepspeed.extra.zero_optimization.zero_hpz_partition_size keeps more than a share of each parameter"
    assert find_stage_obstacle(training(extra={"zero_optimization": zero})) == obstacle
    assert find_stage_obstacle(training(extra={"zero_optimization": {"zero_quantized_weights": False}})) is None
    assert find_loading_obstacle(training(), tiny_model) is None
    assert find_loading_obstacle(training(), tiny_model, four_bit=True) == "its weights are quantised"
    assert find_loading_obstacle(nvme, tiny_model) is not None


class Neighbours:
    """Collectives of a worker whose neighbour sees `theirs`."""

    workers = 2

    def __init__(self, theirs: object) -> None:
        self._theirs = theirs

    def gather(self, value: Any) -> list[Any]:
        return [value, self._theirs]


@pytest.mark.parametrize("theirs", ["its weights are quantised", {"model.safetensors": 1}])
def test_workers_that_see_other_files_do_not_wait_for_one_another(tiny_model: Path, theirs: object) -> None:
    settings: dict[str, Any] = {"four_bit": False, "weights": torch.float32, "micro": 1, "device": torch.device("cpu")}
    neighbours: Any = Neighbours(theirs)
    with pytest.raises(ModelError, match="is not the same on all workers"):
        create_splitter(training(), tiny_model, **settings, collectives=neighbours)


@pytest.mark.parametrize("size", [20_000_000, LARGEST_BUCKET])
def test_a_bucket_of_the_recipe_is_that_of_the_splitter(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    configs = []
    monkeypatch.setattr(compat, "import_deepspeed", lambda _: None)
    monkeypatch.setattr(compat, "zero_init", configs.append)
    collectives = Collectives()
    settings: dict[str, Any] = {"four_bit": False, "weights": torch.float32, "micro": 1, "device": torch.device("cpu")}
    bucket = {"zero_optimization": {"reduce_bucket_size": size}}
    create_splitter(training(extra=bucket), tiny_model, **settings, collectives=collectives)
    assert configs[0]["zero_optimization"]["reduce_bucket_size"] == size
