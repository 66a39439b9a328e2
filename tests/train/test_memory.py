"""What a worker holds, and what to change when it was not enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apprentice.recipe import Recipe, load_recipe
from apprentice.train.memory import GIB, held, out_of_memory, ran_out, smaller
from tests.recipes import tiny_recipe


def recipe(folder: Path, **changes: Any) -> Recipe:
    return load_recipe(tiny_recipe(folder, folder, **changes))


# 1000 numbers, all trained, two workers: bytes of weights, gradients and optimizer
@pytest.mark.parametrize(
    ("stage", "dtype", "expected"),
    [
        (0, torch.float32, (4000, 4000, 8000)),
        (1, torch.float32, (4000, 4000, 4000)),
        (2, torch.bfloat16, (2000, 2000, 6000)),
        (3, torch.bfloat16, (1000, 2000, 6000)),
    ],
)
def test_each_stage_shares_out_more(stage: int, dtype: torch.dtype, expected: tuple[int, ...], tmp_path: Path) -> None:
    found = held(recipe(tmp_path, training__deepspeed={"stage": stage}), 1000, 1000, dtype, 2)
    assert (found.weights, found.gradients, found.optimizer) == expected
    assert found.total == sum(expected)


def test_frozen_weights_adafactor_and_offload(tmp_path: Path) -> None:
    found = held(recipe(tmp_path), 1000, 10, torch.bfloat16, 1)
    assert (found.weights, found.gradients, found.optimizer) == (2000, 40, 120)
    slim = recipe(tmp_path, training__optimizer={"name": "adafactor"}, training__deepspeed={"stage": 0})
    assert held(slim, 1000, 1000, torch.bfloat16, 2).optimizer == 0
    away = recipe(tmp_path, training__deepspeed={"stage": 2, "offload": "cpu"})
    assert held(away, 1000, 1000, torch.bfloat16, 2).optimizer == 0


def test_the_smallest_changes_come_first(tmp_path: Path) -> None:
    made = recipe(tmp_path, training__global_batch=16, tuning={"method": "full"})
    assert [change.partition(" (")[0] for change in smaller(made, 8, 2)] == [
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
    assert smaller(least, 1, 2) == ["data.packing.length: 128"]
    assert [change.partition(" (")[0] for change in smaller(recipe(tmp_path, training__resources={"gpus": 1}), 1, 1)][:2] == [
        "training.activation_checkpointing: true",
        "training.deepspeed.offload: cpu",
    ]


def test_every_change_is_a_recipe(tmp_path: Path) -> None:
    made = recipe(tmp_path, training__global_batch=16, tuning={"method": "full"}, training__resources={"gpus": 1})
    changes = smaller(made, 8, 2)
    assert len(changes) == 6
    for change in changes:
        key, _, value = change.partition(" (")[0].partition(": ")
        values = [f"{key}={value}", *(["data.max_length=128"] if key.startswith("data") else [])]
        assert load_recipe(tmp_path / "recipe.yaml", values) != made


def test_the_sentence(tmp_path: Path) -> None:
    made = recipe(tmp_path, training__global_batch=16)
    state = held(made, GIB, GIB // 4, torch.bfloat16, 2)
    error = out_of_memory(made, state, 8, 256, 2, " (78.0 of 79.2 GiB of the GPU were in use)")
    assert str(error) == (
        "a worker ran out of memory with 8 rows of 256 tokens at once (78.0 of 79.2 GiB of the GPU were in use): weights take about"
        " 2.00 GiB, gradients 0.50 and the optimizer 1.50, activations the rest. The smallest changes that help:"
        " training.micro_batch: 4 (the same steps, more passes), or training.activation_checkpointing: true (a third more time)."
    )


def test_what_counts_as_running_out() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert ran_out(caught.value)
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory"))
    assert not ran_out(RuntimeError("shapes differ"))
    assert not ran_out(ValueError("can't allocate memory"))
