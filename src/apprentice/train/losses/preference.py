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
from apprentice.train.losses.sft import TargetLoss


class PreferenceLoss(TargetLoss):
    """DPO loss, float32, summed over the pairs of a micro-batch.

    For answers y⁺ and y⁻, policy π and reference ρ: −log σ(m), m = β · ((log π(y⁺) − log ρ(y⁺)) − (log π(y⁻) − log ρ(y⁻))); with
    label smoothing ε, −(1 − ε) · log σ(m) − ε · log σ(−m).
    """

    def __init__(self, model: nn.Module, dpo: DPO, compute: torch.dtype | None = None) -> None:
        super().__init__(model, compute)
        self._dpo = dpo

    def forward(  # type: ignore[override]  # other arguments: an engine calls the loss with what its micro-batches hold
        self, input_ids: Tensor, positions: Tensor, answers: Tensor, reference: Tensor, is_target: Tensor
    ) -> Tensor:
        """All arguments have shape (rows, length), except `reference`: (answers,) float32, the reference's log-probabilities.

        `answers` numbers each token's answer, int64: 2p for the better and 2p + 1 for the worse answer of pair p. Sets `figures` to
        sums over the pairs: `accuracy` (1 if the better answer has the higher reward), `chosen_reward`, `rejected_reward` (each
        β · (log π − log ρ)) and `margin`, their difference.
        """
        own = self.log_probabilities(input_ids, positions, answers, reference, is_target)
        rewards = self._dpo.beta * (own - reference).view(-1, 2)  # (pairs, 2)
        margin = rewards[:, 0] - rewards[:, 1]
        smoothing = self._dpo.label_smoothing
        loss = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
        self.figures = _shown(rewards)
        return loss.sum()

    def log_probabilities(
        self, input_ids: Tensor, positions: Tensor, answers: Tensor, reference: Tensor, is_target: Tensor
    ) -> Tensor:
        """The model's log-probability of every answer, summed over its target tokens; shape (answers,)."""
        losses = self._losses_at(input_ids, positions, is_target, "none")
        owners = answers[:, 1:][is_target[:, 1:]]
        return torch.zeros_like(reference).index_add(0, owners, -losses)


class RewardLoss(TargetLoss):
    """Bradley-Terry loss −log σ(r(y⁺) − r(y⁻)), float32, summed over the pairs of a micro-batch; r is the reward of an answer."""

    def forward(  # type: ignore[override]  # as above; the values of `reference` are not used
        self, input_ids: Tensor, positions: Tensor, answers: Tensor, reference: Tensor, is_target: Tensor
    ) -> Tensor:
        """Arguments and `figures` are those of `PreferenceLoss`; rewards are read at the last target token of each answer."""
        places = torch.arange(answers.numel(), device=answers.device).view_as(answers)
        last = torch.zeros_like(reference, dtype=torch.long)
        last = last.scatter_reduce(0, answers[is_target], places[is_target], "amax")  # flat place of an answer's last target
        if self._flat:
            input_ids, positions = input_ids.reshape(1, -1), positions.reshape(1, -1)
        with self._casting():
            found = token_rewards(self.model, input_ids, positions)
        rewards = found.reshape(-1)[last].view(-1, 2)
        self.figures = _shown(rewards)
        return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).sum()


def _shown(rewards: Tensor) -> dict[str, Tensor]:
    """The figures of both losses: sums over pairs, from rewards of shape (pairs, 2), the better answer first."""
    better, worse = rewards.detach().double().unbind(dim=1)
    named = {"accuracy": better > worse, "margin": better - worse, "chosen_reward": better, "rejected_reward": worse}
    return {name: values.double().sum() for name, values in named.items()}
