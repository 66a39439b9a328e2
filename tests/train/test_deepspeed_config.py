"""The recipe's words as DeepSpeed's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apprentice.errors import RecipeError
from apprentice.recipe import Training
from apprentice.train.deepspeed_config import deepspeed_config, micro_batch


def training(**values: Any) -> Training:
    return Training.model_validate({"workers": 2, "steps": 5, "global_batch": 16} | values)


def config(dtype: torch.dtype = torch.float32, **values: Any) -> dict[str, Any]:
    return deepspeed_config(training(**values), workers=2, micro=2, dtype=dtype, trainable=1000)


def test_sizes_multiply() -> None:
    made = config()
    assert made["train_batch_size"] == 16
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stage_and_clipping(stage: int) -> None:
    made = config(deepspeed={"stage": stage}, optimizer={"clip": 0.5})
    assert made["zero_optimization"]["stage"] == stage
    assert made["gradient_clipping"] == 0.5
    assert made["bf16"] == {"enabled": False}
    assert "offload_optimizer" not in made["zero_optimization"]


def test_bfloat16_adds_up_in_float32_at_every_stage() -> None:
    stages = [config(torch.bfloat16, deepspeed={"stage": stage}) for stage in range(4)]
    assert [made["zero_optimization"]["stage"] for made in stages] == [1, 1, 2, 3]
    assert {made["data_types"]["grad_accum_dtype"] for made in stages} == {"fp32"}
    assert all(made["bf16"]["enabled"] for made in stages)


def test_offload() -> None:
    assert config(deepspeed={"stage": 2, "offload": "cpu"})["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_buckets_are_no_larger_than_what_is_trained() -> None:
    assert config()["zero_optimization"]["reduce_bucket_size"] == 1000


def test_micro_batch() -> None:
    assert micro_batch(training(), workers=2, length=1024, on_gpu=False) == 2
    assert micro_batch(training(), workers=2, length=1024, on_gpu=True) == 8
    assert micro_batch(training(micro_batch=4), workers=2, length=1024, on_gpu=False) == 4
    with pytest.raises(RecipeError, match="micro_batch 8 does not divide the 4 rows"):
        micro_batch(training(micro_batch=8), workers=4, length=1024, on_gpu=False)
    with pytest.raises(RecipeError, match="cannot be divided among 3 workers"):
        micro_batch(training(), workers=3, length=1024, on_gpu=False)
