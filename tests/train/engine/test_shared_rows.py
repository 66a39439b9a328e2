"""Workers that share rows train as one process does that has each example by itself: losses, weights, validation, resuming."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.engine import shared_rows_training

LIMIT_S = 300.0  # for all cases of one number of processes, on a busy machine too; a run that hangs would take for ever


def case(method: str, stage: int, sharing: int, kv_heads: int, **more: bool) -> dict[str, Any]:
    chosen = {"method": method, "stage": stage, "sharing": sharing, "kv_heads": kv_heads}
    return chosen | {"checkpointing": False, "weighted": False, "window": False, "resumes": False} | more


CASES = [
    (4, case("full", 3, 4, 2, checkpointing=True, resumes=True)),
    (4, case("lora", 2, 2, 4, weighted=True)),
    (4, case("full", 0, 2, 1, window=True)),
    (2, case("full", 3, 2, 2, checkpointing=True)),
    (2, case("lora", 1, 2, 4, weighted=True)),
    (2, case("full", 0, 2, 1, resumes=True)),
]
NAMES = [f"{workers}-{'-'.join(str(key) + str(value) for key, value in each.items())}" for workers, each in CASES]
# Those of two processes run by hand; tests/train/distributed/test_driver.py has two workers in CI.
PARAMETERS = [
    pytest.param(number, id=name, marks=[pytest.mark.slow] + ([pytest.mark.long] if CASES[number][0] == 2 else []))
    for number, name in enumerate(NAMES)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """Gives the result of a case; each number of processes is started once, since that takes longer than a case."""
    os.environ["OMP_NUM_THREADS"] = "1"

    @lru_cache
    def of_processes(workers: int) -> dict[int, dict[str, Any]]:
        numbers = [number for number, (size, _) in enumerate(CASES) if size == workers]
        trained = train(workers, tmp_path_factory.mktemp("shared"), [CASES[number][1] for number in numbers])
        return dict(zip(numbers, trained, strict=False))

    return lambda number: of_processes(CASES[number][0]).get(number, {})


def train(workers: int, folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of `cases` in order; those that a hang left out are missing. Ends the processes after `LIMIT_S`."""
    group = torch.multiprocessing.start_processes(
        shared_rows_training.process, (workers, str(folder), cases), nprocs=workers, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + LIMIT_S
    try:
        while not group.join(timeout=max(0.0, deadline - time.monotonic())) and time.monotonic() < deadline:
            pass
    finally:
        for process in group.processes:
            if process.is_alive():
                process.kill()
    saved = folder / "results.pt"
    return torch.load(saved) if saved.exists() else []


def distance(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> float:
    """Distance of two models' weights, as a share of their norm."""
    assert ours.keys() == plain.keys() != set()
    flat, plain_flat = (torch.cat([weights[name].flatten() for name in plain]) for weights in (ours, plain))
    return float((flat - plain_flat).norm() / plain_flat.norm())


@pytest.mark.parametrize("number", PARAMETERS)
def test_shared_rows_are_trained_on_as_in_one_process(results: Callable[[int], dict[str, Any]], number: int) -> None:
    (_, chosen), ours = CASES[number], results(number)
    assert ours, f"the processes hung or failed: no result within {LIMIT_S} s"
    plain = shared_rows_training.plain(chosen)
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert ours["validation"] == pytest.approx(plain["validation"], rel=1e-5)
    assert ours["likeliest"] == plain["likeliest"]
    assert distance(ours["weights"], plain["weights"]) <= 1e-5
    if chosen["resumes"]:
        assert ours["restored"]
        assert ours["resumed_loss"] == pytest.approx(plain["loss"][-1], rel=1e-5)
        assert distance(ours["resumed_weights"], plain["weights"]) <= 1e-5
