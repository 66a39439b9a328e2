"""The learning rate at named steps, and which parameters decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apprentice.recipe import Optimizer
from apprentice.train.optimizer import adamw, learning_rate, make_optimizer, moment_shapes


def rates(schedule: str, steps: int, warmup: int) -> list[float]:
    optimizer = Optimizer.model_validate({"learning_rate": 1.0, "schedule": schedule, "warmup_steps": warmup})
    return [learning_rate(optimizer, step, step, steps) for step in range(steps)]


def test_schedules() -> None:
    assert rates("constant", 6, 2) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rates("linear", 6, 2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates("cosine", 6, 2) == pytest.approx([0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert rates("inverse_sqrt", 8, 2) == pytest.approx(
        [0.5, 1.0, (2 / 3) ** 0.5, 0.5**0.5, 0.4**0.5, 3**-0.5, (2 / 7) ** 0.5, 0.5]
    )
    assert rates("linear", 4, 0) == [1.0, 0.75, 0.5, 0.25]


def test_a_run_that_ends_by_tokens_falls_with_its_tokens() -> None:
    optimizer = Optimizer(learning_rate=1.0, schedule="linear", warmup_steps=2)
    assert learning_rate(optimizer, 7, 6.0, 10.0) == pytest.approx(0.5)
    assert learning_rate(optimizer, 20, 10.0, 10.0) == 0.0
    assert learning_rate(optimizer, 1, 9.0, 10.0) == 1.0  # warm-up goes by steps


def test_only_matrices_decay() -> None:
    layer = nn.Linear(3, 2)
    groups = adamw(dict(layer.named_parameters()), Optimizer(weight_decay=0.1)).param_groups
    assert [(group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in groups] == [
        (0.1, [(2, 3)]),
        (0.0, [(2,)]),
    ]
    assert len(adamw(dict(layer.named_parameters()), Optimizer()).param_groups) == 1


def test_settings_arrive() -> None:
    optimizer = adamw({"w": nn.Parameter(torch.ones(2, 2))}, Optimizer(learning_rate=0.5, betas=(0.8, 0.9), epsilon=1e-3))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.9), 1e-3)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("shape", [(3, 2), (5,), (2, 3, 4)])
def test_moments_are_those_that_the_optimizer_keeps(name: str, shape: tuple[int, ...]) -> None:
    weight = nn.Parameter(torch.ones(shape))
    optimizer = make_optimizer({"w": weight}, Optimizer.model_validate({"name": name, "weight_decay": 0.1}))
    weight.sum().backward()
    optimizer.step()
    kept = {key: list(value.shape) for key, value in optimizer.state[weight].items() if key != "step"}
    assert kept == moment_shapes(Optimizer.model_validate({"name": name}), weight.shape)
