"""Registry of losses: the loss module for each objective and kind of model.

`apprentice.recipe.OBJECTIVES` says what each objective needs of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from apprentice.recipe import Training
from apprentice.train.losses.distill import DistillationLoss
from apprentice.train.losses.grpo import PolicyLoss
from apprentice.train.losses.kto import KTOLoss
from apprentice.train.losses.objective_loss import ObjectiveLoss
from apprentice.train.losses.preference import IPOLoss, ORPOLoss, PreferenceLoss, RewardLoss, SimPOLoss
from apprentice.train.losses.router_balance import RouterBalancedLoss
from apprentice.train.losses.sft import Seq2SeqLoss, SupervisedLoss
from apprentice.train.losses.shared_rows import SharedRowsLoss


def _supervised(model: Any, training: Training, compute: torch.dtype | None) -> ObjectiveLoss:
    if training.router_loss:
        return RouterBalancedLoss(model, training.router_loss, compute)
    return (Seq2SeqLoss if getattr(model.config, "is_encoder_decoder", False) else SupervisedLoss)(model, compute)


# The objective's loss around a model. The last argument is the number format to multiply in, if it is not that of the weights.
LOSSES: Mapping[str, Callable[[nn.Module, Training, torch.dtype | None], ObjectiveLoss]] = {
    "sft": _supervised,
    "dpo": lambda model, training, compute: PreferenceLoss(model, training.dpo, compute),
    "ipo": lambda model, training, compute: IPOLoss(model, training.ipo, compute),
    "simpo": lambda model, training, compute: SimPOLoss(model, training.simpo, compute),
    "orpo": lambda model, training, compute: ORPOLoss(model, training.orpo, compute),
    "kto": lambda model, training, compute: KTOLoss(model, training.kto, compute),
    "distill": lambda model, training, compute: DistillationLoss(model, training.distill, compute),
    "reward": lambda model, _, compute: RewardLoss(model, compute),
    "grpo": lambda model, training, compute: PolicyLoss(model, training.grpo, compute),
}


def create_loss(model: nn.Module, training: Training, compute: torch.dtype | None = None, *, group: Any = None) -> ObjectiveLoss:
    """Loss module of `training`'s objective around `model`.

    `compute` is the number format to multiply in (autocast) if it is not that of the weights. `group` is the process group of the
    workers that share this worker's rows, if it shares them; the loss then takes `SequencePart`s.
    """
    if group is not None:
        return SharedRowsLoss(model, group, compute)
    return LOSSES[training.objective](model, training, compute)
