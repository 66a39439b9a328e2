"""The learning rate at named steps, and which parameters decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apprentice.recipe import Optimizer
from apprentice.train.optimizer import adamw, learning_rate, make_optimizer, moment_shapes, set_learning_rate


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


def test_second_matrices_of_lora_learn_faster() -> None:
    parameters = {f"layer.lora_{side}.default.weight": nn.Parameter(torch.ones(2, 2)) for side in "AB"}
    parameters["layer.bias"] = nn.Parameter(torch.ones(2))
    optimizer = adamw(parameters, Optimizer(learning_rate=0.1, loraplus_ratio=16.0, weight_decay=0.5))
    set_learning_rate(optimizer, 0.25)
    rates = {name: group["lr"] for group in optimizer.param_groups for name, p in parameters.items() if p is group["params"][0]}
    assert rates == {"layer.lora_A.default.weight": 0.25, "layer.lora_B.default.weight": 4.0, "layer.bias": 0.25}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5, 0.0]
    plain = adamw(parameters, Optimizer(learning_rate=0.1))
    assert [sorted(group) for group in plain.param_groups] == [sorted(torch.optim.AdamW([torch.ones(1)]).param_groups[0])]


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
