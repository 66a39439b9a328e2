"""The losses of preferences: how far the model sets the better answer of a pair above the worse one.

DPO (Rafailov et al. 2023) compares the model with a frozen reference, whose log-probabilities come with the rows; a reward model
gives each answer a number of its own (Bradley and Terry 1952). Both answers of a pair lie in one micro-batch. Knows nothing of
where the reference's numbers come from, nor of accumulation or workers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apprentice.models.reward import token_rewards
from apprentice.recipe import DPO
from apprentice.train.losses.sft import TargetLoss


class PreferenceLoss(TargetLoss):
    """The sum of DPO's loss over the pairs of a micro-batch, in float32.

    Of a pair with the answers y⁺ and y⁻, policy π and reference ρ: −log σ(β · ((log π(y⁺) − log ρ(y⁺)) − (log π(y⁻) − log ρ(y⁻)))).
    """

    def __init__(self, model: nn.Module, dpo: DPO, compute: torch.dtype | None = None) -> None:
        super().__init__(model, compute)
        self._dpo = dpo

    def forward(  # type: ignore[override]  # other arguments: an engine calls the loss with what its micro-batches hold
        self, input_ids: Tensor, positions: Tensor, answers: Tensor, reference: Tensor, is_target: Tensor
    ) -> Tensor:
        """All of shape (rows, length) but `reference`, (answers,); `answers` numbers each token's answer, better before worse.

        Leaves in `figures` the sums over the pairs of how often the better answer has the higher reward, of both rewards
        (β · (log π − log ρ)) and of what lies between them.
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
        """The model's own log-probability of every answer, summed over its tokens and its end; shape (answers,)."""
        losses = self._losses_at(input_ids, positions, is_target, "none")
        owners = answers[:, 1:][is_target[:, 1:]]
        return torch.zeros_like(reference).index_add(0, owners, -losses)


class RewardLoss(TargetLoss):
    """The sum over the pairs of a micro-batch of −log σ(r(y⁺) − r(y⁻)), in float32: r is what a reward model gives an answer."""

    def forward(  # type: ignore[override]  # as above; what a reference says is not looked at
        self, input_ids: Tensor, positions: Tensor, answers: Tensor, reference: Tensor, is_target: Tensor
    ) -> Tensor:
        """Arguments and `figures` as those of `PreferenceLoss`."""
        places = torch.arange(answers.numel(), device=answers.device).view_as(answers)
        last = torch.zeros_like(reference, dtype=torch.long)
        last = last.scatter_reduce(0, answers[is_target], places[is_target], "amax")  # of each answer, its end
        if self._flat:
            input_ids, positions = input_ids.reshape(1, -1), positions.reshape(1, -1)
        with self._casting():
            found = token_rewards(self.model, input_ids, positions)
        rewards = found.reshape(-1)[last].view(-1, 2)
        self.figures = _shown(rewards)
        return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).sum()


def _shown(rewards: Tensor) -> dict[str, Tensor]:
    """Sums over pairs, from rewards of shape (pairs, 2)."""
    better, worse = rewards.detach().double().unbind(dim=1)
    named = {"accuracy": better > worse, "margin": better - worse, "chosen_reward": better, "rejected_reward": worse}
    return {name: values.double().sum() for name, values in named.items()}
