"""Supervised loss of one worker's part of rows that several workers share: all of their sums together are the loss of the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apprentice.models.attention.ulysses import SharedSequence
from apprentice.train.batch import SequencePart
from apprentice.train.losses.chunked_cross_entropy import TargetPlaces
from apprentice.train.losses.objective_loss import ObjectiveLoss


class SharedRowsLoss(ObjectiveLoss):
    """`SupervisedLoss` of a causal model over the part that this worker of `group`, a process group, holds of a micro-batch.

    The model must have `ULYSSES` attention, and all workers of the group must call it together, in the backward pass too.
    """

    def __init__(self, model: nn.Module, group: Any, compute: torch.dtype | None = None) -> None:
        super().__init__(model, compute)
        self._group = group

    def forward(self, batch: SequencePart) -> Tensor:
        """Summed loss of the targets that this worker's tokens predict."""
        shared = SharedSequence(batch.bounds.starts, batch.bounds.longest, self._group)
        arguments = {"input_ids": batch.input_ids, "position_ids": batch.positions, "shared_sequence": shared}
        places = TargetPlaces(batch.places, batch.input_ids.shape[1])
        if batch.weights is None:
            return self.targets.at_places(arguments, places, batch.labels, "sum")
        return (self.targets.at_places(arguments, places, batch.labels, "none") * batch.weights).sum()
