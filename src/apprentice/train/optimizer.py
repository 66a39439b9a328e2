"""The optimizer and its learning rate as a pure function of how far the run is.

Knows nothing of DeepSpeed, workers or data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from apprentice.recipe import Optimizer


def learning_rate(optimizer: Optimizer, step: int, reached: float, steps: float) -> float:
    """The rate of the step after `step` finished ones, in a run of about `steps`.

    Warm-up rises evenly and reaches the full rate with its last step. After it the schedule falls from 1 to 0 as `reached`
    (finished steps, or for runs that end by tokens or epochs the part done × `steps`) goes from the warm-up's end to `steps`; the
    inverse square root goes by steps alone, so that it does not depend on where the run ends.
    """
    warmup = optimizer.warmup_steps
    if step < warmup:
        return optimizer.learning_rate * (step + 1) / warmup
    if optimizer.schedule == "inverse_sqrt":
        first = max(warmup, 1)
        return optimizer.learning_rate * math.sqrt(first / max(step + 1, first))
    part = min(max((reached - warmup) / max(steps - warmup, 1e-9), 0.0), 1.0)
    factor = {"constant": 1.0, "linear": 1.0 - part, "cosine": 0.5 * (1.0 + math.cos(math.pi * part))}[optimizer.schedule]
    return optimizer.learning_rate * factor


def optimizer_of(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> torch.optim.Optimizer:
    """The optimizer that the recipe names."""
    if optimizer.name == "adafactor":
        decay = optimizer.weight_decay
        return torch.optim.Adafactor(list(parameters.values()), lr=optimizer.learning_rate, weight_decay=decay)
    return adamw(parameters, optimizer)


def moments(name: str, shape: torch.Size) -> dict[str, list[int]]:
    """What optimizer `name` keeps of a parameter of `shape` beside its steps: name → shape."""
    if name == "adamw":
        return {"exp_avg": list(shape), "exp_avg_sq": list(shape)}
    if len(shape) < 2:
        return {"variance": list(shape)}
    return {"row_var": [*shape[:-1], 1], "col_var": [*shape[:-2], 1, shape[-1]]}


def adamw(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> torch.optim.AdamW:
    """AdamW over `parameters`; weight decay is for matrices only, not for norms and biases."""
    matrices = [parameter for parameter in parameters.values() if parameter.dim() >= 2]
    others = [parameter for parameter in parameters.values() if parameter.dim() < 2]
    if optimizer.weight_decay == 0.0:
        matrices, others = [*matrices, *others], []
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": optimizer.weight_decay}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=optimizer.learning_rate, betas=optimizer.betas, eps=optimizer.epsilon, fused=True)
