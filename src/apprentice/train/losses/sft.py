"""Supervised fine-tuning losses: the sum of the target tokens' negative log-likelihoods, each times its example's weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from apprentice.train.batch import Seq2SeqBatch, SupervisedBatch
from apprentice.train.losses.objective_loss import ObjectiveLoss


class SupervisedLoss(ObjectiveLoss):
    """Negative log-likelihood (nats, float32) of a causal model, summed over the target tokens of a micro-batch."""

    def forward(self, batch: SupervisedBatch) -> Tensor:
        """Loss of `batch`. Raises `RecipeError` if its rows hold several examples with prefix or prompt tuning."""
        ids, positions, is_target, bounds = batch
        if is_target.dtype == torch.bool:
            return self.targets.causal(ids, positions, is_target, "sum", bounds)
        losses = self.targets.causal(ids, positions, is_target > 0, "none", bounds)
        return (losses * _weights(is_target[:, 1:])).sum()

    def target_log_probabilities(self, prompt: Tensor, reply: Tensor, is_target: Tensor) -> Tensor:
        """Log-probabilities (nats, (targets,)) of the target tokens of `reply` after `prompt`; arguments have shape (1, tokens)."""
        both, targets = torch.cat([prompt, reply], dim=1), F.pad(is_target, (prompt.shape[1], 0))
        return -self.targets.causal(both, None, targets, "none")


class Seq2SeqLoss(ObjectiveLoss):
    """The same for an encoder-decoder: prompts in the encoder's rows, answers in the decoder's."""

    def forward(self, batch: Seq2SeqBatch) -> Tensor:
        """Loss of `batch`. Raises `RecipeError` if its rows hold several examples with prefix or prompt tuning."""
        weights = batch.is_target
        if weights.dtype == torch.bool:
            return self.targets.seq2seq(batch, "sum")
        losses = self.targets.seq2seq(batch._replace(is_target=weights > 0), "none")
        return (losses * _weights(weights)).sum()

    def target_log_probabilities(self, prompt: Tensor, reply: Tensor, is_target: Tensor) -> Tensor:
        """As in `SupervisedLoss`; `prompt` goes to the encoder, `reply` to the decoder."""
        places = torch.arange(reply.shape[1], device=reply.device)[None]
        batch = Seq2SeqBatch(prompt, torch.ones_like(prompt), reply, places, torch.ones_like(reply), is_target)
        return -self.targets.seq2seq(batch, "none")


def _weights(weights: Tensor) -> Tensor:
    """The weights that are not 0, in order; shape (targets,)."""
    return weights[weights > 0]
