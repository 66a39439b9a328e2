"""Supervised fine-tuning losses: the sum of the target tokens' negative log-likelihoods, each times its example's weight."""

from __future__ import annotations

import torch
from torch import Tensor

from apprentice.train.batch import Seq2SeqBatch, SupervisedBatch, target_places
from apprentice.train.losses.chunked_cross_entropy import Reduction
from apprentice.train.losses.objective_loss import ObjectiveLoss


class SupervisedLoss(ObjectiveLoss):
    """Negative log-likelihood (nats, float32) of a causal model, summed over the target tokens of a micro-batch."""

    def forward(self, batch: SupervisedBatch) -> Tensor:
        """Loss of `batch`. Raises `RecipeError` if its rows hold several examples with prefix or prompt tuning."""
        places, has_weights = target_places(batch), batch.is_target.dtype != torch.bool
        reduction: Reduction = "none" if has_weights else "sum"
        losses = self.targets.causal(batch.input_ids, batch.positions, places, reduction, batch.bounds)
        return (losses * batch.is_target.flatten()[places]).sum() if has_weights else losses

    def target_log_probabilities(self, prompt: Tensor, reply: Tensor, is_target: Tensor) -> Tensor:
        """Log-probabilities (nats, (targets,)) of the target tokens of `reply` after `prompt`; arguments have shape (1, tokens)."""
        both = torch.cat([prompt, reply], dim=1)
        return -self.targets.causal(both, None, prompt.shape[1] + is_target.flatten().nonzero()[:, 0], "none")


class Seq2SeqLoss(ObjectiveLoss):
    """The same for an encoder-decoder: prompts in the encoder's rows, answers in the decoder's."""

    def forward(self, batch: Seq2SeqBatch) -> Tensor:
        """Loss of `batch`. Raises `RecipeError` if its rows hold several examples with prefix or prompt tuning."""
        if batch.is_target.dtype == torch.bool:
            return self.targets.seq2seq(batch, "sum")
        batch = batch._replace(places=target_places(batch))
        return (self.targets.seq2seq(batch, "none") * batch.is_target.flatten()[batch.places]).sum()

    def target_log_probabilities(self, prompt: Tensor, reply: Tensor, is_target: Tensor) -> Tensor:
        """As in `SupervisedLoss`; `prompt` goes to the encoder, `reply` to the decoder."""
        places = torch.arange(reply.shape[1], device=reply.device)[None]
        batch = Seq2SeqBatch(prompt, torch.ones_like(prompt), reply, places, torch.ones_like(reply), is_target)
        return -self.targets.seq2seq(batch, "none")
