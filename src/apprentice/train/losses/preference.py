"""Preference losses: DPO (Rafailov et al. 2023), and the Bradley-Terry loss of reward models (Bradley and Terry 1952).

DPO compares the model with a frozen reference, whose log-probabilities come with the rows; a reward model gives each answer a
number of its own. Both answers of a pair lie in the same row, the better one before the worse one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apprentice.models.reward import token_rewards
from apprentice.recipe import DPO
from apprentice.train.batch import PreferenceBatch, target_places
from apprentice.train.losses.objective_loss import ObjectiveLoss
from apprentice.train.losses.target_losses import TargetLosses


class PreferenceLoss(ObjectiveLoss):
    """DPO loss, float32, summed over the pairs of a micro-batch.

    For answers y⁺ and y⁻, policy π and reference ρ: −log σ(m), m = β · ((log π(y⁺) − log ρ(y⁺)) − (log π(y⁻) − log ρ(y⁻))); with
    label smoothing ε, −(1 − ε) · log σ(m) − ε · log σ(−m).
    """

    def __init__(self, model: nn.Module, dpo: DPO, compute: torch.dtype | None = None) -> None:
        super().__init__(model, compute)
        self._dpo = dpo

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """Loss of `batch`.

        Sets `figures` to sums over the pairs: `accuracy` (1 if the better answer has the higher reward), `chosen_reward`,
        `rejected_reward` (each β · (log π − log ρ)) and `margin`, their difference.
        """
        rewards = self._dpo.beta * (answer_log_probabilities(self.targets, batch) - batch.reference).view(-1, 2)  # (pairs, 2)
        margin = rewards[:, 0] - rewards[:, 1]
        smoothing = self._dpo.label_smoothing
        loss = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
        self.figures = _sums(rewards)
        return loss.sum()


class RewardLoss(ObjectiveLoss):
    """Bradley-Terry loss −log σ(r(y⁺) − r(y⁻)), float32, summed over the pairs of a micro-batch; r is the reward of an answer."""

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """Loss of `batch`. `figures` are those of `PreferenceLoss`; rewards are read at the last target token of each answer."""
        places = target_places(batch)
        last = torch.zeros_like(batch.reference, dtype=torch.long)  # flat place of each answer's last target
        last = last.scatter_reduce(0, batch.answers.flatten()[places], places, "amax")
        arguments = self.targets.model_arguments(batch.input_ids, batch.positions, batch.bounds)
        with self.targets.casting():
            of_tokens = token_rewards(self.model, **arguments)
        rewards = of_tokens.reshape(-1)[last].view(-1, 2)
        self.figures = _sums(rewards)
        return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).sum()


def answer_log_probabilities(targets: TargetLosses, batch: PreferenceBatch) -> Tensor:
    """Log-probability of every answer, summed over its target tokens; shape (answers,)."""
    places = target_places(batch)
    losses = targets.causal(batch.input_ids, batch.positions, places, "none", batch.bounds)
    owners = batch.answers.flatten()[places]
    return torch.zeros_like(batch.reference).index_add(0, owners, -losses)


def _sums(rewards: Tensor) -> dict[str, Tensor]:
    """The figures of both losses: sums over pairs, from rewards of shape (pairs, 2), the better answer first."""
    better, worse = rewards.detach().double().unbind(dim=1)
    named = {"accuracy": better > worse, "margin": better - worse, "chosen_reward": better, "rejected_reward": worse}
    return {name: values.double().sum() for name, values in named.items()}
