"""Base of the losses of all objectives: modules around a model, called with a micro-batch of their objective."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apprentice.train.losses.target_losses import TargetLosses


class ObjectiveLoss(nn.Module):
    """Base of the losses: `forward(batch)` gives the summed loss of a micro-batch of the objective's type, float32.

    The caller divides the sum (`PackedRows.loss_denominator`). `compute` is the number format to multiply in (autocast) if it is
    not that of the weights. `figures` holds other sums over the last micro-batch, by name; it is empty where a loss has none.
    """

    def __init__(self, model: nn.Module, compute: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.targets = TargetLosses(model, compute)
        self.figures: dict[str, Tensor] = {}
