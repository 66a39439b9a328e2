"""GRPO loss (Shao et al. 2024, DeepSeekMath, section 4.1): replies better than the others to their prompt become more likely.

A reply's advantage is its reward, standardised among the replies to the same prompt. The probability ratio to the policy that wrote
the reply is clipped, and a KL penalty holds the policy to a reference model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apprentice.recipe import GRPO
from apprentice.train.losses.sft import TargetLoss

SMALLEST = 1e-4  # added to the standard deviation of a group's rewards


class PolicyLoss(TargetLoss):
    """GRPO loss, float32: the mean over each reply's tokens, summed over the replies of a micro-batch.

    The loss of a token with probability π now, π₀ when it was written, ρ under the reference, in a reply with advantage A, is
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
        """All arguments have shape (rows, length), except `advantages` and `rewards`, which are (replies,) float32.

        `replies` numbers each token's reply, int64. `written` and `reference` are each token's log-probabilities under the policy
        that wrote it and under the reference, float32. Sets `figures` to sums over the replies: `reward`, `reply_tokens` (number
        of tokens), `kl` (divergence from the reference, mean over a reply's tokens) and `clipped` (share of its tokens).
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
    """Log-probability of each token of packed replies, given the tokens before it in its own example."""

    def forward(self, input_ids: Tensor, positions: Tensor | None, is_target: Tensor) -> Tensor:
        """Arguments and result have shape (rows, length); `is_target` is boolean. The result is float32, 0 where it is false."""
        found = torch.zeros(is_target.shape, dtype=torch.float32, device=is_target.device)
        found[:, 1:][is_target[:, 1:]] = -self._losses_at(input_ids, positions, is_target, "none")
        return found


def advantages(rewards: Tensor) -> Tensor:
    """Advantages from rewards, both (prompts, group): standard deviations above the mean of the replies to the same prompt.

    Zeros where all replies to a prompt have the same reward. The standard deviation is the sample's (n − 1), with `SMALLEST` added,
    as in TRL; the paper does not say.
    """
    if not len(rewards):
        return rewards
    apart = rewards - rewards.mean(dim=1, keepdim=True)
    return apart / (rewards.std(dim=1, keepdim=True) + SMALLEST)
