"""DeepSpeed in two processes against plain PyTorch in one: losses, norms, updates, and the state carried over."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing

from tests.train import pair

CASES: list[dict[str, Any]] = [
    {"stage": 2, "dtype": "float32", "method": "full", "clip": 1.0},
    {"stage": 2, "dtype": "float32", "method": "full", "clip": 0.0},
    {"stage": 0, "dtype": "float32", "method": "full", "clip": 1.0},
    {"stage": 1, "dtype": "float32", "method": "full", "clip": 1.0},
    {"stage": 3, "dtype": "float32", "method": "full", "clip": 1.0},
    {"stage": 2, "dtype": "float32", "method": "lora", "clip": 1.0},
    {"stage": 3, "dtype": "float32", "method": "lora", "clip": 1.0},
    {"stage": 0, "dtype": "bfloat16", "method": "full", "clip": 1.0},
    {"stage": 2, "dtype": "bfloat16", "method": "full", "clip": 1.0},
    {"stage": 2, "dtype": "bfloat16", "method": "lora", "clip": 1.0},
    {"stage": 3, "dtype": "bfloat16", "method": "full", "clip": 1.0},
]
NAMES = ["-".join(str(value) for value in case.values()) for case in CASES]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes saw, for all cases one after the other: starting them takes longer than a case."""
    folder = tmp_path_factory.mktemp("pair")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.multiprocessing.spawn(pair.process, (str(folder), CASES), nprocs=2)
    return list(json.loads((Path(folder) / "found.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_equals_plain_pytorch(found: list[dict[str, Any]], number: int) -> None:
    case, ours = CASES[number], found[number]
    reference = pair.reference(case["method"], case["clip"])
    assert len(ours["loss"]) == pair.STEPS
    if case["dtype"] == "float32":
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert ours["norm"] == pytest.approx(reference["norm"], rel=1e-5)
        assert ours["update"] == pytest.approx(reference["update"], rel=1e-5)
        assert ours["validation"] == pytest.approx(reference["validation"], rel=1e-5)
    else:
        assert ours["loss"][0] == pytest.approx(reference["loss"][0], rel=1e-3)
        assert ours["norm"][0] == pytest.approx(reference["norm"][0], rel=2e-2)
        assert ours["loss"][-1] == pytest.approx(reference["loss"][-1], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_state_goes_out_and_in(found: list[dict[str, Any]], number: int) -> None:
    ours = found[number]
    assert ours["tensors"] == 3 * {"full": 20, "lora": 28}[CASES[number]["method"]]
    assert ours["restored"]
    assert ours["same_step"]
