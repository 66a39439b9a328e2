"""The search for the most rows at once, with a model that runs out of memory where a test says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apprentice.recipe import load_recipe
from apprentice.train import worker
from apprentice.train.batch import SupervisedBatch
from apprentice.train.losses.sft import SupervisedLoss
from apprentice.train.memory.batch_size import USABLE_GPU_MEMORY, find_largest_fitting, fits_into_memory
from apprentice.train.memory.measure import estimate_peak_memory
from apprentice.train.memory.model_size import measure_model_size
from tests.models.architectures import made
from tests.support.recipes import tiny_recipe


@pytest.mark.parametrize(("rows", "most", "expected"), [(12, 12, 12), (12, 5, 4), (12, 1, 1), (12, 0, 1), (1, 9, 1), (7, 6, 1)])
def test_the_largest_divisor_that_fits(rows: int, most: int, expected: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= most

    assert find_largest_fitting(rows, fits) == expected
    assert len(tried) <= 3
    assert all(rows % size == 0 for size in tried)


class LossWithRoom(SupervisedLoss):
    """Has room for `room` tokens at once; counts its passes."""

    def __init__(self, room: int) -> None:
        super().__init__(made("llama").train())
        self.room, self.passes = room, 0

    def forward(self, batch: SupervisedBatch) -> torch.Tensor:
        self.passes += 1
        if batch.input_ids.numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(batch)


def test_a_pass_is_tried_and_leaves_nothing() -> None:
    loss, cpu = LossWithRoom(128), torch.device("cpu")
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    assert [fits_into_memory(loss, rows, 32, 1e6, cpu) for rows in (1, 4, 5)] == [True, True, False]
    assert loss.passes == 3
    assert all(parameter.grad is None for parameter in loss.parameters())
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())
    assert not fits_into_memory(loss, 1, 32, 2**60, cpu)  # no room for what is held aside
    assert loss.passes == 3


def test_other_errors_are_not_taken_for_a_lack_of_room(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = LossWithRoom(128)
    monkeypatch.setattr(SupervisedLoss, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        fits_into_memory(loss, 1, 32, 0, torch.device("cpu"))


@pytest.mark.parametrize(("others", "expected"), [(True, 4), (False, 1)])
def test_all_workers_take_what_fits_on_each(others: bool, expected: int, tmp_path: Path, tiny_model: Path) -> None:
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, training__global_batch=16, tuning={"method": "full"}))
    collectives: Any = SimpleNamespace(workers=2, rank=0, gather=lambda mine: [mine, others and mine])
    model = made("llama").train()
    patched = LossWithRoom(4 * 96)
    assert worker.find_micro_batch(recipe, model, 96, torch.float32, torch.device("cpu"), collectives, loss=patched) == expected
    assert patched.passes == 2


def test_of_a_split_model_the_estimate_decides(tmp_path: Path, tiny_model: Path) -> None:
    recipe = load_recipe(
        tiny_recipe(
            tmp_path, tiny_model, training__global_batch=16, training__resources={"gpus": 1}, training__deepspeed={"stage": 3}
        )
    )

    def most(mine: float, other: float) -> int:
        collectives: Any = SimpleNamespace(workers=2, rank=0, gather=lambda value: [value, other])
        return worker.estimate_micro_batch(recipe, 256, torch.float32, collectives, mine)

    numbers = measure_model_size(recipe, torch.float32)
    parts = {"workers": 2, "length": 256}
    sizes = (recipe, numbers.parameters, numbers.trained, torch.float32)
    needed = {rows: estimate_peak_memory(*sizes, micro=rows, **parts).total / USABLE_GPU_MEMORY for rows in (2, 4, 8)}
    assert needed[2] < needed[4] < needed[8]
    for_8, for_4, for_2 = 1.1 * needed[8], (needed[4] + needed[8]) / 2, (needed[2] + needed[4]) / 2
    assert most(for_8, for_8) == 8
    assert most(for_4, for_8) == 4  # of all workers' GPUs the smallest counts
    assert most(for_8, for_2) == 2
    assert most(0.0, for_8) == 1
