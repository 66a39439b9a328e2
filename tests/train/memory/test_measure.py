"""What a worker holds, and what to change when it was not enough."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apprentice.errors import TrainingError
from apprentice.recipe import Recipe, load_recipe
from apprentice.train.checkpoint.shard_writer import WINDOW_BYTES
from apprentice.train.engine.deepspeed_config import LARGEST_BUCKET
from apprentice.train.memory.estimate import (
    NCCL_BYTES,
    NF4_BYTES,
    PROCESS_BYTES,
    estimate_memory,
    gathered_weight_bytes,
    offloaded_bytes,
)
from apprentice.train.memory.measure import (
    GIB,
    OutOfMemoryAdvisor,
    choose_changes,
    estimate_peak_memory,
    free_memory,
    is_out_of_memory,
    list_smaller_recipes,
    out_of_memory_error,
)
from tests.support.recipes import tiny_recipe


def recipe(folder: Path, **changes: Any) -> Recipe:
    return load_recipe(tiny_recipe(folder, folder, **changes))


# 1000 numbers, all trained, two workers: bytes of weights, gradients and optimizer
@pytest.mark.parametrize(
    ("stage", "dtype", "expected"),
    [
        (0, torch.float32, (4000, 4000, 8000)),
        (0, torch.bfloat16, (2000, 4000, 6000)),  # which runs as stage 1
        (1, torch.float32, (4000, 4000, 4000)),
        (2, torch.bfloat16, (2000, 2000, 6000)),
        (3, torch.bfloat16, (1000, 2000, 6000)),
    ],
)
def test_each_stage_shares_out_more(stage: int, dtype: torch.dtype, expected: tuple[int, ...], tmp_path: Path) -> None:
    memory = estimate_memory(recipe(tmp_path, training__deepspeed={"stage": stage}), 1000, 1000, dtype, 2)
    assert (memory.weights, memory.gradients, memory.optimizer) == expected
    assert memory.total == sum(expected)


def test_states_in_fewer_bytes(tmp_path: Path) -> None:
    for states, moments in (("float32", 8), ("bfloat16", 4), ("8bit", 2 + 8 / 256)):
        made = recipe(tmp_path, training__optimizer={"states": states})
        assert estimate_memory(made, 1000, 1000, torch.bfloat16, 2).optimizer == 500 * (4 + moments)


def test_frozen_weights_adafactor_and_offload(tmp_path: Path) -> None:
    memory = estimate_memory(recipe(tmp_path), 1000, 10, torch.bfloat16, 1)
    assert (memory.weights, memory.gradients, memory.optimizer) == (2000, 40, 120)
    slim = recipe(tmp_path, training__optimizer={"name": "adafactor"}, training__deepspeed={"stage": 0})
    assert estimate_memory(slim, 1000, 1000, torch.bfloat16, 2).optimizer == 0
    on_disk = {"stage": 3, "offload": "nvme", "nvme_path": "/fast"}
    in_memory = {"stage": 2, "offload": "cpu"}
    for deepspeed, gpus, optimizer, gradients in (
        (in_memory, 1, 0, 0),
        (on_disk, 1, 0, 0),
        (in_memory | {"stage": 1}, 1, 0, 4000),  # which reduces gradients only after the last pass
        (in_memory, 0, 6000, 2000),
        (on_disk, 0, 0, 2000),
    ):
        away = recipe(tmp_path, training__deepspeed=deepspeed, training__resources={"gpus": gpus})
        elsewhere = estimate_memory(away, 1000, 1000, torch.bfloat16, 2)
        assert (elsewhere.optimizer, elsewhere.gradients) == (optimizer, gradients)


def test_what_is_offloaded_lies_on_the_host_once(tmp_path: Path) -> None:
    def host(**deepspeed: Any) -> float:
        away = recipe(tmp_path, training__deepspeed=deepspeed, training__resources={"gpus": 1})
        return offloaded_bytes(away, 3000, 1000, torch.bfloat16, 2)

    assert host(stage=3) == 0
    assert host(stage=3, offload="cpu") == 500 * (4 + 8 + 4 + 4)  # weight, moments, gradients added up, gradient of the update
    assert host(stage=2, offload="cpu") == 500 * (4 + 8 + 4 + 2 + 2)  # and here gradients and updated weights in 16 bits
    assert host(stage=3, offload_parameters="cpu") == 2 * 1500
    assert host(stage=3, offload="nvme", nvme_path="/fast") == 500 * 4 + 4 * 4 * 500  # DeepSpeed's buffers for the disk


def test_gpus_have_buffers_for_gradients_on_their_way(tmp_path: Path) -> None:
    def buffers(trained: int, workers: int, gpus: float = 1, **deepspeed: Any) -> float:
        on = recipe(tmp_path, training__deepspeed=deepspeed, training__resources={"gpus": gpus})
        return estimate_memory(on, 10**10, trained, torch.bfloat16, workers).buffers

    assert buffers(10**10, 8, stage=2) == NCCL_BYTES + LARGEST_BUCKET * (2 + 2 + 4)
    assert buffers(1000, 8, stage=3) == NCCL_BYTES + 1000 * 8
    assert buffers(10**10, 1, stage=2, extra={"zero_optimization": {"reduce_bucket_size": 10}}) == 80
    assert buffers(10**10, 8, gpus=0, stage=2) == 0  # gloo's are in the process


def test_weights_in_4_bits(tmp_path: Path) -> None:
    assert pytest.approx(0.516, abs=1e-3) == NF4_BYTES
    four_bit = estimate_memory(recipe(tmp_path), 1000, 0, torch.bfloat16, 1, quantized=800)
    assert four_bit.weights == pytest.approx(200 * 2 + 800 * NF4_BYTES)


def test_zero_3_has_whole_weights_beside_its_shares(tmp_path: Path) -> None:
    def whole(**deepspeed: Any) -> float:
        return gathered_weight_bytes(recipe(tmp_path, training__deepspeed=deepspeed), 2 * 10**9, torch.bfloat16)

    assert whole(stage=2) == 0
    assert whole(stage=3) == 2 * (10**9 + 5 * 10**7)
    few = {"stage3_max_live_parameters": 10**8, "stage3_prefetch_bucket_size": 10**6}
    assert whole(stage=3, extra={"zero_optimization": few}) == 2 * (10**8 + 10**6)


def test_process_and_checkpoint_are_in_the_hosts_memory(tmp_path: Path, tiny_model: Path) -> None:
    made = load_recipe(tiny_recipe(tmp_path, tiny_model, tuning={"method": "full"}))
    rows = {"workers": 2, "micro": 2, "length": 256}
    here = estimate_peak_memory(made, 10**9, 10**9, torch.bfloat16, **rows)
    assert here.process == PROCESS_BYTES
    assert here.checkpoint == 6 * 10**9 + WINDOW_BYTES
    assert estimate_peak_memory(made, 1000, 1000, torch.bfloat16, **rows).checkpoint == 6000 + 6000
    on_gpu = load_recipe(tiny_recipe(tmp_path, tiny_model, tuning={"method": "full"}, training__resources={"gpus": 1}))
    on_device = estimate_peak_memory(on_gpu, 10**9, 10**9, torch.bfloat16, **rows)
    assert (on_device.process, on_device.checkpoint) == (0, 0)
    mask = 2 * 256 * 256 * 2
    masked = load_recipe(tiny_recipe(tmp_path, tiny_model, tuning={"method": "full"}, model__attention="sdpa"))
    with_masks = estimate_peak_memory(masked, 10**9, 10**9, torch.bfloat16, **rows).activations
    # Each of two layers keeps a mask where attention is not told bounds.
    assert 0 < on_device.activations == here.activations < with_masks - mask


def test_the_smallest_changes_come_first(tmp_path: Path) -> None:
    made = recipe(tmp_path, training__global_batch=16, tuning={"method": "full"})
    assert [change.text.partition(" (")[0] for change in list_smaller_recipes(made, 8, 256, 2)] == [
        "training.micro_batch: 4",
        "training.activation_checkpointing: true",
        "training.deepspeed.stage: 3",
        "tuning.method: lora",
        "data.packing.length: 128",
    ]
    least = recipe(
        tmp_path,
        training__activation_checkpointing=True,
        training__deepspeed={"stage": 3, "offload": "cpu"},
        training__resources={"gpus": 1},
    )
    assert [change.text for change in list_smaller_recipes(least, 1, 256, 2)] == ["data.packing.length: 128"]
    assert [
        change.text.partition(" (")[0]
        for change in list_smaller_recipes(recipe(tmp_path, training__resources={"gpus": 1}), 1, 256, 1)
    ][:2] == [
        "training.activation_checkpointing: true",
        "training.deepspeed.offload: cpu",
    ]


@pytest.mark.parametrize(("method", "number"), [("full", 6), ("qlora", 4)])
def test_every_change_is_a_recipe(method: str, number: int, tmp_path: Path) -> None:
    made = recipe(tmp_path, training__global_batch=16, tuning={"method": method}, training__resources={"gpus": 1})
    changes = list_smaller_recipes(made, 8, 256, 2)
    assert len(changes) == number
    for change in changes:
        key, _, value = change.text.partition(" (")[0].partition(": ")
        values = [f"{key}={value}", *(["data.max_length=128"] if key.startswith("data") else [])]
        assert load_recipe(tmp_path / "recipe.yaml", values) != made


def test_the_sentence(tmp_path: Path) -> None:
    made = recipe(tmp_path, training__global_batch=16)
    state = replace(estimate_memory(made, GIB, GIB // 4, torch.bfloat16, 2), activations=3 * GIB)
    assert state.total == 7 * GIB
    error = out_of_memory_error(
        state, 8, 256, " (78.0 of 79.2 GiB of the GPU were in use)", list_smaller_recipes(made, 8, 256, 2)[:2]
    )
    assert str(error) == (
        "a worker ran out of memory with 8 rows of 256 tokens at once (78.0 of 79.2 GiB of the GPU were in use): weights take about"
        " 2.00 GiB, gradients 0.50, the optimizer 1.50 and activations 3.00. The smallest changes that help:"
        " training.micro_batch: 4 (the same steps, more passes), or training.activation_checkpointing: true (a third more time)."
    )


def test_changes_that_would_fit_are_named_first(tmp_path: Path) -> None:
    changes = list_smaller_recipes(recipe(tmp_path, training__global_batch=16, tuning={"method": "full"}), 8, 256, 2)
    sizes = dict(zip((change.text for change in changes), (9.0, 8.0, 6.0, 3.0, 4.0), strict=True))
    assert choose_changes(changes, lambda change: sizes[change.text], 6.0) == [changes[2], changes[3]]
    assert choose_changes(changes, lambda change: sizes[change.text], 3.5) == [
        changes[3],
        changes[4],
    ]  # one fits, and the nearest other
    assert choose_changes(changes, lambda change: sizes[change.text], 1.0) == [changes[3], changes[4]]


def test_a_worker_names_what_fits_by_its_own_estimate(tmp_path: Path, tiny_model: Path) -> None:
    """Where the optimizer is what is large, fewer rows would not help."""
    made = load_recipe(tiny_recipe(tmp_path, tiny_model, training__deepspeed={"stage": 0}, tuning={"method": "full"}))
    watch = OutOfMemoryAdvisor(made, 10**9, torch.float32, 2, 256, 2, torch.device("cpu"))
    with (
        pytest.raises(TrainingError, match=r"activations 0\.0\d\. The .*: training.deepspeed.stage: 1, or tuning.method: lora\.$"),
        watch.explain_errors(),
    ):
        raise torch.OutOfMemoryError
    small = OutOfMemoryAdvisor(made, 10**5, torch.float32, 2, 256, 2, torch.device("cpu"))
    with (
        pytest.raises(TrainingError, match=r"help: training.micro_batch: 1 .*, or training.activation_checkpointing: true"),
        small.explain_errors(),
    ):
        raise torch.OutOfMemoryError


def test_free_memory() -> None:
    assert 2**20 < free_memory() < 2**50


def test_what_counts_as_running_out() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
