"""The recipe's words as DeepSpeed's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apprentice.errors import RecipeError
from apprentice.recipe import Training
from apprentice.train.engine.deepspeed_config import choose_micro_batch, deepspeed_config


def training(**values: Any) -> Training:
    return Training.model_validate({"workers": 2, "steps": 5, "global_batch": 16} | values)


def config(dtype: torch.dtype = torch.float32, **values: Any) -> dict[str, Any]:
    return deepspeed_config(training(**values), workers=2, micro=2, dtype=dtype, trainable=1000)


def test_sizes_multiply() -> None:
    made = config()
    assert made["train_batch_size"] == 16
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 4


def test_workers_that_share_rows_take_part_in_each_others_rows() -> None:
    made = deepspeed_config(training(workers=4, sequence_parallel=2), workers=4, micro=2, dtype=torch.float32, trainable=1000)
    assert made["gradient_accumulation_steps"] == 4  # of the eight rows of a group
    assert made["train_batch_size"] == 32  # rows of each worker, as DeepSpeed counts them
    long = training(workers=4, sequence_parallel=4, global_batch=4)
    assert [choose_micro_batch(long, workers=4, length=size, on_gpu=True) for size in (8192, 32768)] == [4, 1]


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


def test_every_kind_of_offload() -> None:
    zero = config(deepspeed={"stage": 3, "offload": "nvme", "offload_parameters": "cpu", "nvme_path": "/fast"})["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "pin_memory": False, "nvme_path": "/fast"}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": False}


@pytest.mark.parametrize(
    ("deepspeed", "reason"),
    [
        ({"stage": 2, "offload_parameters": "cpu"}, "offload_parameters needs stage 3"),
        ({"stage": 2, "offload": "nvme", "nvme_path": "/fast"}, "offload nvme needs stage 3"),
        ({"stage": 0, "offload": "cpu"}, "offload cpu needs stage 1"),
        ({"stage": 3, "offload": "nvme"}, "`nvme_path` belongs to `nvme`"),
        ({"stage": 3, "nvme_path": "/fast"}, "`nvme_path` belongs to `nvme`"),
    ],
)
def test_offloads_that_do_not_exist(deepspeed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        training(deepspeed=deepspeed)


def test_float16() -> None:
    made = config(torch.float16, deepspeed={"stage": 0})
    assert (made["fp16"], made["bf16"]) == ({"enabled": True}, {"enabled": False})
    assert made["zero_optimization"]["stage"] == 1


def test_extra_keys_are_passed_through() -> None:
    extra = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}, "wall_clock_breakdown": True}
    made = config(deepspeed={"extra": extra})
    assert made["zero_optimization"] == config()["zero_optimization"] | {"round_robin_gradients": True}
    assert made["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"train_batch_size": 4}, r"extra.train_batch_size is 4, and training.global_batch makes it 16"),
        ({"zero_optimization": {"stage": 3}}, r"extra.zero_optimization.stage is 3, and training.deepspeed.stage makes it 2"),
        ({"bf16": {"enabled": True}}, r"extra.bf16.enabled is True, and model.dtype makes it False"),
        ({"optimizer": {"type": "Adam"}}, r"extra.optimizer is decided by training.optimizer"),
        ({"zero_optimization": {"mics_shard_size": 4}}, r"extra.zero_optimization.mics_shard_size divides the state among some"),
        ({"data_types": "fp16"}, r"extra.data_types is 'fp16', and the recipe makes it"),
    ],
)
def test_extra_keys_that_contradict(extra: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        config(deepspeed={"extra": extra})


def test_adafactor_needs_whole_matrices() -> None:
    with pytest.raises(ValueError, match="adafactor needs whole matrices, and ZeRO stage 2"):
        training(optimizer={"name": "adafactor"})
    assert training(optimizer={"name": "adafactor"}, deepspeed={"stage": 0}).optimizer.name == "adafactor"


def test_buckets_are_no_larger_than_what_is_trained() -> None:
    assert config()["zero_optimization"]["reduce_bucket_size"] == 1000


def test_micro_batch() -> None:
    assert choose_micro_batch(training(), workers=2, length=1024, on_gpu=False) == 2
    assert choose_micro_batch(training(), workers=2, length=1024, on_gpu=True) == 8
    assert choose_micro_batch(training(micro_batch=4), workers=2, length=1024, on_gpu=False) == 4
    with pytest.raises(RecipeError, match="micro_batch 8 does not divide the 4 rows"):
        choose_micro_batch(training(micro_batch=8), workers=4, length=1024, on_gpu=False)
    with pytest.raises(RecipeError, match="cannot be divided among 3 workers"):
        choose_micro_batch(training(), workers=3, length=1024, on_gpu=False)
