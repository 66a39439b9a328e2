"""DeepSpeed in one, two and four processes against plain PyTorch in one: losses, gradients, updates, and the state carried over."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from apprentice.train.batch import SupervisedBatch
from apprentice.train.engine.deepspeed import DeepSpeedEngine
from tests.train import reference_training

PLAIN: dict[str, Any] = {
    "workers": 2,
    "accumulation": 3,
    "stage": 2,
    "dtype": "float32",
    "method": "full",
    "clip": 1.0,
    "optimizer": "adamw",
}
CASES: list[dict[str, Any]] = [
    *(PLAIN | {"workers": w, "accumulation": a, "stage": s} for w in (1, 2) for a in (1, 3) for s in range(4)),
    PLAIN | {"workers": 4},
    PLAIN | {"clip": 0.0},
    PLAIN | {"weighted": True},
    PLAIN | {"weighted": True, "stage": 3, "method": "lora"},
    PLAIN | {"method": "lora"},
    PLAIN | {"method": "lora", "stage": 3},
    PLAIN | {"method": "adapter"},
    PLAIN | {"method": "adapter", "stage": 3},
    PLAIN | {"optimizer": "adafactor", "stage": 0},
    PLAIN | {"optimizer": "adafactor", "stage": 0, "dtype": "bfloat16"},
    PLAIN | {"states": "8bit", "stage": 0},
    PLAIN | {"states": "8bit"},
    PLAIN | {"states": "8bit", "stage": 3, "method": "lora"},
    PLAIN | {"states": "bfloat16", "stage": 3, "dtype": "bfloat16"},
    PLAIN | {"stage": 0, "dtype": "bfloat16"},
    PLAIN | {"dtype": "bfloat16"},
    PLAIN | {"dtype": "bfloat16", "method": "lora"},
    PLAIN | {"dtype": "bfloat16", "stage": 3},
    *(PLAIN | {"dtype": "float16", "stage": stage, "scale": 2**20} for stage in (2, 3)),  # of four steps one is not left out
    PLAIN | {"dtype": "float16", "scale": 2**30},  # and here none
]
NAMES = ["-".join(str(value) for value in case.values()) for case in CASES]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the processes saw, for all cases one after the other: starting them takes longer than a case."""
    os.environ["OMP_NUM_THREADS"] = "1"
    seen: dict[int, Any] = {}
    for workers in sorted({case["workers"] for case in CASES}):
        numbers = [number for number, case in enumerate(CASES) if case["workers"] == workers]
        folder = tmp_path_factory.mktemp("group")
        arguments = (workers, str(folder), [CASES[number] for number in numbers])
        torch.multiprocessing.spawn(reference_training.process, arguments, nprocs=workers)
        seen |= dict(zip(numbers, torch.load(Path(folder) / "values.pt"), strict=True))
    return [seen[number] for number in range(len(CASES))]


@cache
def reference(method: str, clip: float, optimizer: str, weighted: bool) -> dict[str, Any]:
    return reference_training.reference(method, clip, optimizer, weighted)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_equals_plain_pytorch(outcomes: list[dict[str, Any]], number: int) -> None:
    case, ours = CASES[number], outcomes[number]
    plain = reference(case["method"], case["clip"], case["optimizer"], case.get("weighted", False))
    assert len(ours["loss"]) == reference_training.STEPS
    if "scale" in case:
        assert ours["loss"][0] == pytest.approx(plain["loss"][0], rel=1e-3)
        made = 1 if case["scale"] == 2**20 else 0
        assert (ours["scaling"]["cur_iter"], ours["scaling"]["steps"]) == (reference_training.STEPS, made)
        assert ours["scaling"]["cur_scale"] < case["scale"]
        return
    if case["dtype"] != "float32":
        assert ours["loss"][0] == pytest.approx(plain["loss"][0], rel=1e-3)
        assert ours["norm"][0] == pytest.approx(plain["norm"][0], rel=2e-2)
        assert ours["loss"][-1] == pytest.approx(plain["loss"][-1], rel=1e-2)
        return
    if "states" in case:  # the first step is made before its moments are rounded
        assert (ours["loss"][:2], ours["norm"][:2]) == (
            pytest.approx(plain["loss"][:2], rel=1e-5),
            pytest.approx(plain["norm"][:2], rel=1e-4),
        )
        assert ours["update"] == pytest.approx(plain["update"], rel=1e-5)
        assert ours["loss"][-1] == pytest.approx(plain["loss"][-1], rel=1e-2)
        for name, gradient in plain["gradients"].items():
            assert (ours["gradients"][name] - gradient).norm() <= 0.02 * gradient.norm() + 1e-9, name
        return
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert ours["norm"] == pytest.approx(plain["norm"], rel=1e-5)
    assert ours["update"] == pytest.approx(plain["update"], rel=1e-5)
    assert ours["validation"] == pytest.approx(plain["validation"], rel=1e-5)
    assert ours["likeliest"] == plain["likeliest"]
    if case["optimizer"] == "adamw":
        assert ours["gradients"].keys() == plain["gradients"].keys() != set()
        for name, gradient in plain["gradients"].items():
            assert (ours["gradients"][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_state_goes_out_and_in(outcomes: list[dict[str, Any]], number: int) -> None:
    ours = outcomes[number]
    assert ours["whole"]
    assert ours["restored"]
    assert ours["same_step"]
    assert ours["end_scaling"][0] == ours["end_scaling"][1]
    assert (ours["end_scaling"][0] is None) == (CASES[number]["dtype"] != "float16")


class _ReadTracer(TorchDispatchMode):
    """Notes every read of a tensor's value by the host in `events`."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            self._events.append("read")
        return function(*args, **(kwargs or {}))


class _PlainLoss(nn.Module):
    """A loss with a figure, without a model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.figures: dict[str, torch.Tensor] = {}

    def forward(self, batch: SupervisedBatch) -> torch.Tensor:
        self.figures = {"tokens": torch.tensor(float(batch.input_ids.numel()), dtype=torch.float64)}
        return self.weight * batch.input_ids.float().sum()


class _PlainEngine:
    """What `train_step` calls of DeepSpeed's engine, at stage 0 in one process; notes its calls in `events`."""

    def __init__(self, loss: nn.Module, events: list[str]) -> None:
        self.loss, self.events, self.dp_world_size = loss, events, 1
        self.optimizer = torch.optim.SGD(loss.parameters(), lr=0.0)

    def __call__(self, batch: SupervisedBatch) -> Any:
        self.events.append("forward")
        return self.loss(batch)

    def backward(self, loss: torch.Tensor, **_: Any) -> None:
        loss.backward()

    def step(self) -> None:
        self.events.append("step")

    def train(self) -> None:
        self.loss.train()

    def zero_optimization(self) -> bool:
        return False


def test_a_step_reads_its_numbers_at_its_end() -> None:
    """A read in a micro-batch would let a GPU stand still until the host has queued the next one."""
    events: list[str] = []
    loss: Any = _PlainLoss()
    engine: Any = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine._engine, engine._loss_module, engine._device = _PlainEngine(loss, events), loss, torch.device("cpu")
    engine._parameters, engine._scales_loss, engine._sequence_group = dict(loss.named_parameters()), False, None
    batches = [SupervisedBatch(torch.full((1, size), 3), None, torch.ones(1, size, dtype=torch.bool)) for size in (1, 2, 4)]
    with _ReadTracer(events):
        outcome = engine.train_step(batches, 0.5, 0.1)
    assert outcome == (42.0, 10.5, {"tokens": 7.0})
    assert events == ["forward", "step"] * 3 + ["read"] * 3
