"""The loss of an on-policy round: what made a reply better than the others to its prompt becomes more likely.

GRPO (Shao et al. 2024, DeepSeekMath, section 4.1): each reply's advantage is its reward among the replies to the same prompt, the
change of the policy within a round is clipped, and the policy is held to a reference. Knows nothing of who wrote or scored the
replies, nor of accumulation or workers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apprentice.recipe import GRPO
from apprentice.train.losses.sft import TargetLoss

SMALLEST = 1e-4  # deviation of a group's rewards


class PolicyLoss(TargetLoss):
    """The sum over the replies of a micro-batch of each one's mean over its tokens, in float32.

    Of a token with probability π now, π₀ when it was written, ρ under the reference, in a reply with advantage A:
    −min(r·A, clip(r, 1−ε, 1+ε)·A) + β · (ρ/π − log(ρ/π) − 1), where r = π/π₀.
    """

    def __init__(self, model: nn.Module, grpo: GRPO, compute: torch.dtype | None = None) -> None:
        super().__init__(model, compute)
        self._grpo = grpo

    def forward(  # type: ignore[override]  # other arguments: an engine calls the loss with what its micro-batches hold
        self,
        input_ids: Tensor,
        positions: Tensor | None,
        replies: Tensor,
        written: Tensor,
        reference: Tensor,
        advantages: Tensor,
        rewards: Tensor,
        is_target: Tensor,
    ) -> Tensor:
        """All of shape (rows, length) but `advantages` and `rewards`, (replies,); `replies` numbers each token's reply.

        `written` and `reference` are log-probabilities of each token, of the policy that wrote it and of the reference. Leaves in
        `figures` the sums over the replies of reward, tokens, divergence from the reference and the share of tokens that
        were clipped; the last two are means over a reply's tokens.
        """
        own = -self._losses_at(input_ids, positions, is_target, "none")
        owners, before, held = (table[:, 1:][is_target[:, 1:]] for table in (replies, written, reference))
        lengths = torch.zeros_like(advantages).index_add(0, owners, torch.ones_like(own))
        ratio, advantage = (own - before).exp(), advantages[owners]
        clipped = ratio.clamp(1 - self._grpo.clip, 1 + self._grpo.clip)
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        apart = held - own
        divergence = apart.exp() - apart - 1
        share = 1 / lengths[owners]
        with torch.no_grad():
            bound = (clipped * advantage < ratio * advantage).to(share)
            shown = {"reward": rewards, "reply_tokens": lengths, "kl": divergence * share, "clipped": bound * share}
            self.figures = {name: values.double().sum() for name, values in shown.items()}
        return ((self._grpo.beta * divergence - gain) * share).sum()


class ReplyLogProbs(TargetLoss):
    """What a model gives to each token of packed replies, given all before it in its own example."""

    def forward(self, input_ids: Tensor, positions: Tensor | None, is_target: Tensor) -> Tensor:
        """All of shape (rows, length), `is_target` boolean; so is the result, float32, with 0 where no token is a target."""
        found = torch.zeros(is_target.shape, dtype=torch.float32, device=is_target.device)
        found[:, 1:][is_target[:, 1:]] = -self._losses_at(input_ids, positions, is_target, "none")
        return found


def advantages(rewards: Tensor) -> Tensor:
    """Of each reply among those to its prompt, from rewards of shape (prompts, group): how many standard deviations above the mean.

    Zeros where all replies to a prompt are worth the same: there is nothing to learn from them. The deviation is the sample's, with
    `SMALLEST` added to it, as TRL has it; the paper does not say.
    """
    if not len(rewards):
        return rewards
    apart = rewards - rewards.mean(dim=1, keepdim=True)
    return apart / (rewards.std(dim=1, keepdim=True) + SMALLEST)
