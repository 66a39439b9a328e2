"""Registry of losses: the loss module for each objective and kind of model.

`apprentice.recipe.OBJECTIVES` says what each objective needs of the data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from apprentice.recipe import Training
from apprentice.train.losses.grpo import PolicyLoss
from apprentice.train.losses.preference import PreferenceLoss, RewardLoss
from apprentice.train.losses.sft import PairLoss, TargetLoss


def loss_of(model: nn.Module, training: Training, compute: torch.dtype | None = None) -> TargetLoss:
    """Loss module of `training`'s objective around `model`.

    `compute` is the number format to multiply in (autocast) if it is not that of the weights.
    """
    if training.objective == "dpo":
        return PreferenceLoss(model, training.dpo, compute)
    if training.objective == "reward":
        return RewardLoss(model, compute)
    if training.objective == "grpo":
        return PolicyLoss(model, training.grpo, compute)
    inner: Any = model
    return PairLoss(model, compute) if getattr(inner.config, "is_encoder_decoder", False) else TargetLoss(model, compute)
