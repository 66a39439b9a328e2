"""Optimizers (AdamW, Adafactor), the number formats they work in, and the learning rate, a pure function of how far the run is.

Whatever is different for Adafactor is decided here:

    AdamW      two moments a weight, in float32 or less; 16-bit weights have float32 copies, which it updates; works on any shard
               of a tensor
    Adafactor  a row and a column of moments for each matrix; updates float32 weights in place; needs whole matrices
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apprentice.recipe import Optimizer
from apprentice.train.engine.compat import whole_shape
from apprentice.train.low_precision_adamw import LowPrecisionAdamW, state_bytes

RATIO = "rate_ratio"  # key of a parameter group: its learning rate as a multiple of the run's
LORA_B = ".lora_B."  # in the names of LoRA's second matrices, as peft has them


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


class NumberFormats(NamedTuple):
    """Number formats of a training: of the model's `weights`, and of the products where it is another one (autocast)."""

    weights: torch.dtype
    autocast: torch.dtype | None


def number_formats(optimizer: Optimizer, dtype: torch.dtype) -> NumberFormats:
    """Number formats with which a model is trained whose products are to be made in `dtype`."""
    if _updates_in_place(optimizer):  # with no float32 copy, so the weights themselves are float32
        return NumberFormats(torch.float32, dtype if dtype != torch.float32 else None)
    return NumberFormats(dtype, None)


def moment_bytes(optimizer: Optimizer) -> float:
    """Bytes of optimizer state for a weight; 0 for Adafactor, whose rows and columns are next to nothing."""
    if _updates_in_place(optimizer):
        return 0.0
    return 8.0 if optimizer.states == "float32" else state_bytes(optimizer.states)


def can_be_sharded(optimizer: Optimizer) -> bool:
    """Whether the optimizer works on shards of tensors, as ZeRO makes them."""
    return not _updates_in_place(optimizer)


def _updates_in_place(optimizer: Optimizer) -> bool:
    return optimizer.name == "adafactor"


def make_optimizer(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, over `parameters`."""
    if optimizer.name == "adafactor":
        decay = optimizer.weight_decay
        return torch.optim.Adafactor(list(parameters.values()), lr=optimizer.learning_rate, weight_decay=decay)
    return adamw(parameters, optimizer)


def moment_shapes(optimizer: Optimizer, shape: torch.Size) -> dict[str, list[int]]:
    """State tensors that the optimizer keeps for a parameter of `shape`: name → shape. The step count is not among them."""
    if optimizer.name == "adamw":
        return {"exp_avg": list(shape), "exp_avg_sq": list(shape)}
    if len(shape) < 2:
        return {"variance": list(shape)}
    return {"row_var": [*shape[:-1], 1], "col_var": [*shape[:-2], 1, shape[-1]]}


def begin_state(optimizer: torch.optim.Optimizer, settings: Optimizer, parameter: Tensor, steps: int) -> None:
    """Sets the state that `optimizer` has of `parameter` to moments of 0 after `steps` steps."""
    if isinstance(optimizer, LowPrecisionAdamW):
        optimizer.begin_state(parameter, steps)
        return
    shapes = moment_shapes(settings, parameter.shape)
    optimizer.state[parameter] = {"step": torch.tensor(float(steps), device=parameter.device)} | {
        key: parameter.new_zeros(shape) for key, shape in shapes.items()
    }


def read_moment(optimizer: torch.optim.Optimizer, moment: Tensor) -> Tensor:
    """Values of `moment`, a flat part of a tensor of the optimizer's state; it is they, or stands for them in 8 bits."""
    return optimizer.read(moment) if isinstance(optimizer, LowPrecisionAdamW) else moment


def write_moment(optimizer: torch.optim.Optimizer, moment: Tensor, values: Tensor) -> None:
    """Sets `moment`, as in `read_moment`, to `values`."""
    if isinstance(optimizer, LowPrecisionAdamW):
        optimizer.write(moment, values)
    else:
        moment.copy_(values)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Sets the learning rate of the next step; groups with a `RATIO` get that multiple of it. A wrapped optimizer will do."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATIO, 1.0)


def adamw(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> torch.optim.Optimizer:
    """AdamW over `parameters`, fused where its moments are float32.

    Weight decay applies to tensors of two or more dimensions, not to norms and biases. LoRA's second matrices have a group of their
    own where their learning rate is another.
    """
    grouped: dict[tuple[float, float], list[nn.Parameter]] = {(optimizer.weight_decay, 1.0): []}  # (decay, ratio) → parameters
    for name, parameter in sorted(parameters.items(), key=lambda item: len(whole_shape(item[1])) < 2):  # matrices first
        decay = optimizer.weight_decay if len(whole_shape(parameter)) >= 2 else 0.0
        ratio = optimizer.loraplus_ratio if LORA_B in name else 1.0
        grouped.setdefault((decay, ratio), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for (decay, ratio), members in grouped.items():
        if members:
            group = {"params": members, "weight_decay": decay, "lr": optimizer.learning_rate * ratio}
            groups.append(group | ({} if ratio == 1.0 else {RATIO: ratio}))
    settings: dict[str, Any] = {"lr": optimizer.learning_rate, "betas": optimizer.betas, "eps": optimizer.epsilon}
    if optimizer.states != "float32":
        return LowPrecisionAdamW(groups, optimizer.states, **settings)
    return torch.optim.AdamW(groups, **settings, fused=True)
