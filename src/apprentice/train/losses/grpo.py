"""GRPO loss (Shao et al. 2024, DeepSeekMath, section 4.1): replies better than the others to their prompt become more likely.

A reply's advantage is its reward, standardised among the replies to the same prompt. The probability ratio to the policy that
wrote the reply is clipped, and a KL penalty holds the policy to a reference model. Since the ratio is to the policy that wrote, it
is also the importance weight of replies that older weights wrote (`grpo.staleness`).

Corrections: another clip for tokens that become more likely, and a mean over tokens (DAPO, Yu et al. 2025, arXiv 2503.14476,
sections 3.1 and 3.3); no division by the reply's length, nor by the deviation of its group's rewards (Dr. GRPO, Liu et al. 2025,
arXiv 2503.20783, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apprentice.recipe import GRPO
from apprentice.train.batch import RolloutBatch, SupervisedBatch, target_places
from apprentice.train.losses.objective_loss import ObjectiveLoss
from apprentice.train.losses.target_losses import TargetLosses

SMALLEST = 1e-4  # added to the standard deviation of a group's rewards


class PolicyLoss(ObjectiveLoss):
    """GRPO loss, float32: the mean over each reply's tokens, summed over the replies of a micro-batch.

    The loss of a token with probability π now, π₀ when it was written, ρ under the reference, in a reply with advantage A, is
    −min(r·A, clip(r, 1−ε, 1+ε′)·A) + β · (ρ/π − log(ρ/π) − 1), where r = π/π₀ and ε′ = ε unless `clip_high` is another.

    With `loss_mean: tokens` it is the sum over all tokens, which the caller divides by their number in the step; with
    `max_new_tokens` each reply's sum is divided by that number.
    """

    def __init__(self, model: nn.Module, grpo: GRPO, compute: torch.dtype | None = None) -> None:
        super().__init__(model, compute)
        self._grpo = grpo

    def forward(self, batch: RolloutBatch) -> Tensor:
        """Loss of `batch`.

        Sets `figures` to sums over the replies: `reward`, `reply_tokens` (number of tokens), `kl` (divergence from the reference,
        mean over a reply's tokens) and `clipped` (share of its tokens).
        """
        places = target_places(batch)
        own = -self.targets.causal(batch.input_ids, batch.positions, places, "none", batch.bounds)
        tables = (batch.replies, batch.policy_log_probs, batch.reference_log_probs)
        owners, before, reference = (table.flatten()[places] for table in tables)
        lengths = torch.zeros_like(batch.advantages).index_add(0, owners, torch.ones_like(own))
        ratio, advantage = (own - before).exp(), batch.advantages[owners]
        clip_high = self._grpo.clip if self._grpo.clip_high is None else self._grpo.clip_high
        clipped = ratio.clamp(1 - self._grpo.clip, 1 + clip_high)
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        distance = reference - own
        divergence = distance.exp() - distance - 1
        share = 1 / lengths[owners]
        with torch.no_grad():
            bound = (clipped * advantage < ratio * advantage).to(share)
            of_replies = {"reward": batch.rewards, "reply_tokens": lengths, "kl": divergence * share, "clipped": bound * share}
            self.figures = {name: values.double().sum() for name, values in of_replies.items()}
        losses = self._grpo.beta * divergence - gain
        if self._grpo.loss_mean == "replies":
            return (losses * share).sum()
        return losses.sum() / (1 if self._grpo.loss_mean == "tokens" else self._grpo.max_new_tokens)


def token_log_probabilities(targets: TargetLosses, batch: SupervisedBatch) -> Tensor:
    """Log-probability of each target token of packed replies, given the tokens before it in its own example.

    Float32 (rows, length), 0 for all other tokens.
    """
    log_probs = torch.zeros(batch.is_target.shape, dtype=torch.float32, device=batch.is_target.device)
    places = target_places(batch)
    log_probs.view(-1)[places] = -targets.causal(batch.input_ids, batch.positions, places, "none", batch.bounds)
    return log_probs


def advantages(rewards: Tensor, *, scale_rewards: bool = True) -> Tensor:
    """Advantages from rewards, both (prompts, group): standard deviations above the mean of the replies to the same prompt.

    Zeros where all replies to a prompt have the same reward. The standard deviation is the sample's (n − 1), with `SMALLEST` added,
    as in TRL; the paper does not say. Without `scale_rewards`, the distance from the mean is not divided by it.
    """
    if not len(rewards):
        return rewards
    distance = rewards - rewards.mean(dim=1, keepdim=True)
    return distance / (rewards.std(dim=1, keepdim=True) + SMALLEST) if scale_rewards else distance
