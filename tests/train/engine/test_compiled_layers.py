"""Compiled layers under DeepSpeed: steps are those of layers that are not compiled."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from apprentice.models.acceleration.compilation import LENGTHS, compile_layers
from apprentice.models.attention.segments import register_segments
from apprentice.recipe import Training
from apprentice.train.engine.deepspeed import DeepSpeedEngine
from tests.support.process_group import join_group
from tests.train.reference_training import fresh
from tests.train.rows import packed_rows

CASES = list(itertools.product((0, 2), ("full", "lora"), ("eager", "inductor")))
STEPS = 3


def steps_of(stage: int, method: str, backend: str | None) -> list[float]:
    """Loss and norm of the gradient of each of `STEPS` steps of two micro-batches; `backend` None compiles nothing."""
    settings = {"workers": 1, "steps": STEPS, "global_batch": 4, "micro_batch": 2, "deepspeed": {"stage": stage}}
    training = Training.model_validate(settings | {"compile": backend is not None})
    model = fresh(method, torch.float32)
    register_segments()
    (model.get_base_model() if method == "lora" else model).set_attn_implementation("segments")
    if backend is not None:
        assert compile_layers(model, backend) == 2
    engine = DeepSpeedEngine(model, training, dtype=torch.float32, workers=1, micro=2, device=torch.device("cpu"))
    values = []
    for seed in range(STEPS):
        rows = packed_rows(4, seed)
        batches = rows.micro_batches(2, None if backend is None else LENGTHS)
        outcome = engine.train_step(batches, 1.0 / rows.loss_denominator, 1e-3)
        values += [outcome.nll / rows.loss_denominator, outcome.grad_norm]
    return values


def process(rank: int, folder: str, cases: list[Any]) -> None:
    join_group(folder)
    results = {case: (steps_of(*case), steps_of(*case[:2], None)) for case in cases}
    torch.save(results, Path(folder) / "steps.pt")


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("eager", marks=pytest.mark.slow),
        pytest.param("inductor", marks=[pytest.mark.long, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]),
    ],
)
def test_steps_are_those_of_plain_layers(backend: str, tmp_path: Path) -> None:
    cases = [case for case in CASES if case[2] == backend]
    torch.multiprocessing.spawn(process, (str(tmp_path), cases), nprocs=1)
    results = torch.load(tmp_path / "steps.pt")
    assert list(results) == cases
    for case, (compiled, plain) in results.items():
        assert compiled == pytest.approx(plain, rel=1e-5), case
        assert plain[0] != plain[2] != 0, case
