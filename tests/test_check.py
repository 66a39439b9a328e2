"""What `check` says about memory before anything is reserved."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from apprentice import check
from apprentice.recipe import load_recipe
from tests.recipes import tiny_recipe


def test_the_memory_of_each_worker_is_estimated_on_gpus_too(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "node_resources", lambda: [{"CPU": 8.0, "GPU": 2.0}])
    monkeypatch.setattr(check, "_parameters", lambda file: 2**30)
    changes = {"training__resources": {"cpus": 1, "gpus": 1}, "training__deepspeed": {"stage": 1}, "model__dtype": "bfloat16"}
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, tuning={"method": "full"}, **changes))
    # 2 bytes of weights and 4 of gradients a number, and half of 12 for the optimizer at stage 1 with two workers
    assert check.POINTS["resources"](recipe) == (
        "2 workers of 1 CPUs, 1 GPUs and at least 12.0 GiB each (weights 2.0, gradients 4.0, optimizer 6.0;"
        " activations come on top); 8 CPUs there"
    )


def test_parameters_are_counted_from_the_header(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model))
    (file,) = tiny_model.glob("*.safetensors")
    assert check._parameters(file) == model.num_parameters()
