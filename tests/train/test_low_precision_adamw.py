"""AdamW with moments in bfloat16 and in 8 bits: against AdamW in float32, and its numbers read and written in parts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apprentice.recipe import Optimizer
from apprentice.train import low_precision_adamw
from apprentice.train.low_precision_adamw import BLOCK, LowPrecisionAdamW
from apprentice.train.optimizer import begin_state, make_optimizer, moment_bytes

KINDS = ["bfloat16", "8bit"]


def settings(states: str, **more: Any) -> Optimizer:
    return Optimizer.model_validate({"states": states, "learning_rate": 0.01, "weight_decay": 0.1, **more})


def trained(states: str, steps: int = 60) -> tuple[Tensor, Any]:
    """A matrix after some steps towards a target, along gradients of sizes from 0.1 to 10 in each block."""
    made = torch.Generator().manual_seed(0)
    target, size = torch.randn(40, 70, generator=made), torch.logspace(-1, 1, 70)
    weight = nn.Parameter(torch.zeros(40, 70))
    optimizer = make_optimizer({"weight": weight}, settings(states))
    for _ in range(steps):
        weight.grad = (weight.detach() - target + 0.1 * torch.randn(40, 70, generator=made)) * size
        optimizer.step()
    return weight.detach(), optimizer


@pytest.mark.parametrize("states", KINDS)
def test_it_learns_what_adamw_learns(states: str) -> None:
    exact, _ = trained("float32")
    near, optimizer = trained(states)
    assert isinstance(optimizer, LowPrecisionAdamW)
    assert 0 < (near - exact).norm() < {"bfloat16": 0.005, "8bit": 0.1}[states] * exact.norm()


@pytest.mark.parametrize("states", KINDS)
def test_bytes_of_the_state_are_those_that_the_estimate_counts(states: str) -> None:
    weight = nn.Parameter(torch.zeros(64, 4 * BLOCK))
    optimizer = make_optimizer({"weight": weight}, settings(states))
    begin_state(optimizer, settings(states), weight, 7)
    state = optimizer.state[weight]
    assert int(state["step"]) == 7
    assert sum(value.nbytes for key, value in state.items() if key != "step") == weight.numel() * moment_bytes(settings(states))
    assert moment_bytes(settings(states)) == {"bfloat16": 4, "8bit": 2 + 8 / BLOCK}[states]
    assert all(not optimizer.read(state[name].view(-1)).any() for name in ("exp_avg", "exp_avg_sq"))


def test_small_steps_of_the_second_moment_are_not_lost_in_bfloat16() -> None:
    weight = nn.Parameter(torch.zeros(BLOCK))
    optimizer = make_optimizer({"weight": weight}, settings("bfloat16"))
    for _ in range(1500):
        weight.grad = torch.full((BLOCK,), 1e-3)
        optimizer.step()
    mean = optimizer.state[weight]["exp_avg_sq"].float().mean()
    assert mean == pytest.approx(1e-6 * (1 - 0.999**1500), rel=0.05)  # rounding to the nearest would stop at 0.4e-6


def test_a_small_second_moment_beside_a_large_one_makes_no_large_step() -> None:
    weight = nn.Parameter(torch.zeros(BLOCK))
    optimizer = make_optimizer({"weight": weight}, settings("8bit", weight_decay=0.0))
    for _ in range(3):
        weight.grad = torch.full((BLOCK,), 1e-4)
        weight.grad[0] = 1e3
        optimizer.step()
    assert weight.abs().max() <= 3 * 0.01 * 1.01


def test_values_of_codes() -> None:
    for signed, size in ((True, 255), (False, 256)):
        values = low_precision_adamw._code_values(signed)
        assert len(values.unique()) == size
        assert values.max() == 1
        assert 0 in values
        assert torch.equal(values, -values.flip(0)) == signed
    optimizer = make_optimizer({"weight": (weight := nn.Parameter(torch.zeros(1000)))}, settings("8bit"))
    begin_state(optimizer, settings("8bit"), weight, 0)
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    moment = optimizer.state[weight]["exp_avg"]
    optimizer.write(moment, numbers)
    assert (optimizer.read(moment) - numbers).abs().max() < 0.01 * numbers.abs().max()


def test_parts_are_written_as_the_whole_is() -> None:
    """Shards of parameters begin and end inside blocks; what was read is written again exactly."""
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    weights = [nn.Parameter(torch.zeros(1000)) for _ in range(2)]
    optimizer: Any = make_optimizer(dict(zip("ab", weights, strict=True)), settings("8bit"))
    for weight in weights:
        begin_state(optimizer, settings("8bit"), weight, 0)
    whole, parts = (optimizer.state[weight]["exp_avg"] for weight in weights)
    optimizer.write(whole, numbers)
    cuts = [0, 100, 130, 250, 700, 999, 1000]
    for start, end in pairwise(cuts):
        optimizer.write(parts[start:end], optimizer.read(whole[start:end]))
    assert torch.equal(parts, whole)
    assert torch.equal(optimizer.read(parts), optimizer.read(whole))
    assert torch.equal(optimizer.read(parts[130:700]), optimizer.read(parts)[130:700])


def test_a_state_begun_again_is_the_one_that_is_read_and_written() -> None:
    """Also where the new tensors lie where earlier ones of other weights lay."""
    weights = [nn.Parameter(torch.zeros(size * BLOCK)) for size in (2, 2, 2)]
    optimizer: Any = make_optimizer({str(place): weight for place, weight in enumerate(weights)}, settings("8bit"))
    for _ in range(20):
        for weight in weights:
            begin_state(optimizer, settings("8bit"), weight, 0)
        for weight in reversed(weights):
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.write(optimizer.state[weight][name], torch.ones_like(weight))
                assert optimizer.state[weight][f"{name}_scale"].eq(1).all()


@pytest.mark.parametrize("states", KINDS)
def test_large_tensors_are_updated_in_chunks(states: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, _ = trained(states, steps=3)
    monkeypatch.setattr(low_precision_adamw, "CHUNK", 2 * BLOCK)
    in_chunks, _ = trained(states, steps=3)
    assert torch.allclose(at_once, in_chunks, rtol=1e-2, atol=1e-4)
    if states == "8bit":
        assert torch.equal(at_once, in_chunks)
