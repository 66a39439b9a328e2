"""Optimizers (AdamW, Adafactor) and the learning rate, a pure function of how far the run is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from apprentice.recipe import Optimizer


def learning_rate(optimizer: Optimizer, step: int, reached: float, steps: float) -> float:
    """Learning rate of the next step after `step` finished ones, in a run of about `steps`.

    Warm-up is linear and reaches the full rate with its last step. After it, `linear` and `cosine` fall to 0 as `reached` goes from
    the warm-up's end to `steps`. `reached` is the number of finished steps; for runs that end by tokens or epochs it is the part
    done × `steps`. `inverse_sqrt` depends on `step` alone, and so not on where the run ends.
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
    """State tensors that optimizer `name` keeps for a parameter of `shape`: name → shape. The step count is not among them."""
    if name == "adamw":
        return {"exp_avg": list(shape), "exp_avg_sq": list(shape)}
    if len(shape) < 2:
        return {"variance": list(shape)}
    return {"row_var": [*shape[:-1], 1], "col_var": [*shape[:-2], 1, shape[-1]]}


def adamw(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> torch.optim.AdamW:
    """Fused AdamW over `parameters`. Weight decay applies to tensors of two or more dimensions, not to norms and biases."""
    matrices = [parameter for parameter in parameters.values() if parameter.dim() >= 2]
    others = [parameter for parameter in parameters.values() if parameter.dim() < 2]
    if optimizer.weight_decay == 0.0:
        matrices, others = [*matrices, *others], []
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": optimizer.weight_decay}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=optimizer.learning_rate, betas=optimizer.betas, eps=optimizer.epsilon, fused=True)
