"""Distillation loss: at each target token the model learns a teacher's probabilities (Hinton et al. 2015, section 2).

Of the teacher the likeliest k tokens are kept, with the mass of all others. The loss is the divergence KL(teacher ‖ model) of
distributions over k + 1 outcomes, the kept tokens and "another one", at temperature T and times T²; where k is the whole
vocabulary it is the divergence of the tokens.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apprentice.recipe import Distill
from apprentice.train.batch import SupervisedBatch, target_places
from apprentice.train.losses.chunked_cross_entropy import Reduction, TargetPlaces
from apprentice.train.losses.objective_loss import ObjectiveLoss
from apprentice.train.losses.target_losses import TargetLosses

SMALLEST_LOG_PROB = -100.0  # of a teacher: what is less likely counts as nothing, and 0 · ∞ is none


class TeacherTokens(NamedTuple):
    """The teacher's likeliest tokens at each target, int64 (targets, k), and their log-probabilities, float32 (targets, k + 1).

    The last log-probability is that of all other tokens together.
    """

    ids: Tensor
    log_probs: Tensor

    def split(self, size: int) -> list[TeacherTokens]:
        """Parts of at most `size` targets."""
        return [TeacherTokens(*part) for part in zip(self.ids.split(size), self.log_probs.split(size), strict=True)]


class DistillationLoss(ObjectiveLoss):
    """Divergence from the teacher (nats, float32) of a causal model, summed over the target tokens of a micro-batch."""

    def __init__(self, model: nn.Module, distill: Distill, compute: torch.dtype | None = None) -> None:
        super().__init__(model, compute)
        self._criterion = partial(divergence, temperature=distill.temperature)

    def forward(self, batch: SupervisedBatch) -> Tensor:
        """Loss of `batch`, whose rows have a teacher's tokens."""
        assert batch.teacher_ids is not None
        assert batch.teacher_log_probs is not None
        teacher = TeacherTokens(batch.teacher_ids, batch.teacher_log_probs)
        arguments = self.targets.model_arguments(batch.input_ids, batch.positions, batch.bounds)
        places = TargetPlaces(target_places(batch) - 1, arguments["input_ids"].shape[1])
        return self.targets.at_places(arguments, places, teacher, "sum", self._criterion)


def target_logits(targets: TargetLosses, batch: SupervisedBatch) -> Tensor:
    """Logits (targets, vocabulary) at the targets of `batch`, all at once."""
    arguments = targets.model_arguments(batch.input_ids, batch.positions, batch.bounds)
    places = TargetPlaces(target_places(batch) - 1, arguments["input_ids"].shape[1])
    return targets.logits_at(arguments, places)


def divergence(logits: Tensor, teacher: TeacherTokens, reduction: Reduction, *, temperature: float) -> Tensor:
    """KL(teacher ‖ model) from the model's logits (targets, vocabulary), times the square of `temperature`."""
    own = (logits / temperature).log_softmax(dim=-1)
    kept = own.gather(-1, teacher.ids)
    known, rest = teacher.log_probs[:, :-1], teacher.log_probs[:, -1]
    losses = (known.exp() * (known - kept)).sum(dim=-1)
    if teacher.ids.shape[1] < logits.shape[1]:
        own_rest = own.scatter(-1, teacher.ids, float("-inf")).logsumexp(dim=-1)
        losses = losses + rest.exp() * (rest - own_rest)
    losses = losses * temperature**2
    return losses.sum() if reduction == "sum" else losses


def likeliest_tokens(logits: Tensor, top: int, temperature: float) -> TeacherTokens:
    """A teacher's `top` likeliest tokens, or all, from its logits (targets, vocabulary)."""
    log_probs = (logits.float() / temperature).log_softmax(dim=-1)
    values, ids = log_probs.topk(min(top, logits.shape[-1]), dim=-1)
    rest = log_probs.scatter(-1, ids, float("-inf")).logsumexp(dim=-1, keepdim=True)
    return TeacherTokens(ids, torch.cat([values, rest], dim=-1).clamp(min=SMALLEST_LOG_PROB))
