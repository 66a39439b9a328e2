"""Preference losses: DPO (Rafailov et al. 2023), IPO, SimPO and ORPO, and the Bradley-Terry loss of reward models (1952).

DPO and IPO compare the model with a frozen reference, whose log-probabilities come with the rows; SimPO and ORPO have none; a
reward model gives each answer a number of its own. Both answers of a pair lie in the same row, the better one first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apprentice.models.reward import token_rewards
from apprentice.recipe import DPO, IPO, ORPO, SimPO
from apprentice.train.batch import LabelledBatch, PreferenceBatch, target_places
from apprentice.train.losses.objective_loss import ObjectiveLoss
from apprentice.train.losses.target_losses import TargetLosses


class AnswerPairs(NamedTuple):
    """The model's and the reference's view of the answers of some pairs; all (pairs, 2), the better answer first."""

    log_probs: Tensor  # log-probability of an answer, summed over its target tokens
    tokens: Tensor  # number of its target tokens
    reference: Tensor  # its log-probability under the reference model

    @property
    def mean_log_probs(self) -> Tensor:
        """Log-probability of an answer a token."""
        return self.log_probs / self.tokens


class PairwiseLoss(ObjectiveLoss):
    """Base of the losses that compare the two answers of each pair: float32, summed over the pairs of a micro-batch."""

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """Loss of `batch`.

        Sets `figures` to sums over the pairs: `accuracy` (1 if the better answer has the higher reward), `chosen_reward`,
        `rejected_reward` and `margin`, their difference.
        """
        places = target_places(batch)
        log_probs = answer_log_probabilities(self.targets, batch)
        tokens = torch.zeros_like(log_probs).index_add(
            0, batch.answers.flatten()[places], torch.ones_like(places, dtype=log_probs.dtype)
        )
        losses, rewards = self.compare(AnswerPairs(*(values.view(-1, 2) for values in (log_probs, tokens, batch.reference))))
        self.figures = _sums(rewards)
        return losses.sum()

    def compare(self, pairs: AnswerPairs) -> tuple[Tensor, Tensor]:
        """The losses (pairs,), and the rewards (pairs, 2) that `figures` are about."""
        raise NotImplementedError


class PreferenceLoss(PairwiseLoss):
    """DPO loss.

    For answers y⁺ and y⁻, policy π and reference ρ: −log σ(m), m = β · ((log π(y⁺) − log ρ(y⁺)) − (log π(y⁻) − log ρ(y⁻))); with
    label smoothing ε, −(1 − ε) · log σ(m) − ε · log σ(−m). The reward of an answer is β · (log π − log ρ).
    """

    def __init__(self, model: nn.Module, dpo: DPO, compute: torch.dtype | None = None) -> None:
        super().__init__(model, compute)
        self._dpo = dpo

    def compare(self, pairs: AnswerPairs) -> tuple[Tensor, Tensor]:
        rewards = self._dpo.beta * (pairs.log_probs - pairs.reference)
        margin = rewards[:, 0] - rewards[:, 1]
        smoothing = self._dpo.label_smoothing
        return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin), rewards


class IPOLoss(PairwiseLoss):
    """IPO loss (Azar et al. 2023, equation 17): (h(y⁺) − h(y⁻) − 1 / (2β))², h(y) = (log π(y) − log ρ(y)) / |y|.

    The paper has sums over an answer's tokens; the mean, with which long answers do not weigh more, is TRL's, whose authors asked
    the paper's for it. The reward of an answer is β · (log π − log ρ), as in DPO.
    """

    def __init__(self, model: nn.Module, ipo: IPO, compute: torch.dtype | None = None) -> None:
        super().__init__(model, compute)
        self._beta = ipo.beta

    def compare(self, pairs: AnswerPairs) -> tuple[Tensor, Tensor]:
        ratios = pairs.log_probs - pairs.reference
        means = ratios / pairs.tokens
        return (means[:, 0] - means[:, 1] - 1 / (2 * self._beta)).square(), self._beta * ratios


class SimPOLoss(PairwiseLoss):
    """SimPO loss (Meng et al. 2024, equation 6): −log σ(r(y⁺) − r(y⁻) − γ), r(y) = β · log π(y) / |y|, the reward of an answer."""

    def __init__(self, model: nn.Module, simpo: SimPO, compute: torch.dtype | None = None) -> None:
        super().__init__(model, compute)
        self._simpo = simpo

    def compare(self, pairs: AnswerPairs) -> tuple[Tensor, Tensor]:
        rewards = self._simpo.beta * pairs.mean_log_probs
        return -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - self._simpo.gamma), rewards


class ORPOLoss(PairwiseLoss):
    """ORPO loss (Hong et al. 2024, equations 3 to 7): −log P(y⁺) − λ · log σ(log odds(y⁺) − log odds(y⁻)).

    P(y) is the geometric mean of the probabilities of an answer's tokens, and odds(y) = P(y) / (1 − P(y)). In the first part each
    pair counts alike, and its prompt not at all, so that a step does not depend on how pairs are spread over micro-batches. The
    reward of an answer is λ · log P(y).
    """

    def __init__(self, model: nn.Module, orpo: ORPO, compute: torch.dtype | None = None) -> None:
        super().__init__(model, compute)
        self._weight = orpo.weight

    def compare(self, pairs: AnswerPairs) -> tuple[Tensor, Tensor]:
        means = pairs.mean_log_probs
        log_odds = means - _log_of_rest(means)
        return -means[:, 0] - self._weight * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1]), self._weight * means


class RewardLoss(ObjectiveLoss):
    """Bradley-Terry loss −log σ(r(y⁺) − r(y⁻)), float32, summed over the pairs of a micro-batch; r is the reward of an answer."""

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """Loss of `batch`. `figures` are those of `PairwiseLoss`; rewards are read at the last target token of each answer."""
        places = target_places(batch)
        last = torch.zeros_like(batch.reference, dtype=torch.long)  # flat place of each answer's last target
        last = last.scatter_reduce(0, batch.answers.flatten()[places], places, "amax")
        arguments = self.targets.model_arguments(batch.input_ids, batch.positions, batch.bounds)
        with self.targets.casting():
            of_tokens = token_rewards(self.model, **arguments)
        rewards = of_tokens.reshape(-1)[last].view(-1, 2)
        self.figures = _sums(rewards)
        return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).sum()


def answer_log_probabilities(targets: TargetLosses, batch: PreferenceBatch | LabelledBatch) -> Tensor:
    """Log-probability of every answer, summed over its target tokens; shape (answers,)."""
    places = target_places(batch)
    losses = targets.causal(batch.input_ids, batch.positions, places, "none", batch.bounds)
    owners = batch.answers.flatten()[places]
    return torch.zeros_like(batch.reference).index_add(0, owners, -losses)


def _log_of_rest(log_probs: Tensor) -> Tensor:
    """log(1 − p) from log p, precise at both ends; p is taken to be at most 1 − 1e-6, so that a sure model has a gradient."""
    log_probs = log_probs.clamp(max=-1e-6)
    return torch.where(log_probs < -math.log(2), torch.log1p(-log_probs.exp()), torch.log(-torch.expm1(log_probs)))


def _sums(rewards: Tensor) -> dict[str, Tensor]:
    """The figures of both losses: sums over pairs, from rewards of shape (pairs, 2), the better answer first."""
    better, worse = rewards.detach().double().unbind(dim=1)
    named = {"accuracy": better > worse, "margin": better - worse, "chosen_reward": better, "rejected_reward": worse}
    return {name: values.double().sum() for name, values in named.items()}
