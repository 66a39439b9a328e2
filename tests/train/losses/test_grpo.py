"""GRPO's loss on packed replies against the formula spelt out token by token, each reply in a forward pass of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from apprentice.recipe import GRPO
from apprentice.train.batch import RolloutBatch, target_places
from apprentice.train.losses.grpo import PolicyLoss, advantages
from tests.models.architectures import made
from tests.train.losses.test_preference import gradients, same
from tests.train.rows import examples_of, packed_rows


def packed() -> tuple[RolloutBatch, list[Any]]:
    """A micro-batch of three packed rows, and each reply's ids and mask."""
    rows = packed_rows(3)
    before = np.cumsum([0, *(int(row.max()) for row in rows.segment_ids)])[:-1]
    replies = torch.from_numpy((rows.segment_ids - 1 + before[:, None]).astype(np.int64))
    shape, rng = rows.input_ids.shape, np.random.default_rng(3)
    batch = RolloutBatch(
        input_ids=torch.from_numpy(rows.input_ids.astype(np.int64)),
        positions=torch.from_numpy(rows.positions.astype(np.int64)),
        replies=replies,
        policy_log_probs=torch.from_numpy(rng.normal(-6.2, 0.3, shape).astype(np.float32)),
        reference_log_probs=torch.from_numpy(rng.normal(-6.2, 0.3, shape).astype(np.float32)),
        advantages=torch.from_numpy(rng.normal(0, 1, int(replies.max()) + 1).astype(np.float32)),
        rewards=torch.arange(int(replies.max()) + 1).float(),
        is_target=torch.from_numpy(rows.loss_mask > 0),
    )
    return batch, examples_of(rows)


def spelt_out(model: Any, grpo: GRPO, batch: RolloutBatch, texts: list[Any]) -> tuple[torch.Tensor, float, float]:
    """Loss, divergence and share of clipped tokens, summed over the replies."""
    total, divergence, clipped = torch.zeros(()), 0.0, 0.0
    for number, (ids, mask) in enumerate(texts):
        here = (batch.replies == number) & batch.is_target
        advantage = float(batch.advantages[number])
        logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
        own = torch.log_softmax(logits[:-1], dim=-1).gather(1, ids[1:, None])[:, 0][mask[1:]]
        each = []
        for now, old, reference in zip(own, batch.policy_log_probs[here], batch.reference_log_probs[here], strict=True):
            ratio = torch.exp(now - old)
            highest = 1 + (grpo.clip if grpo.clip_high is None else grpo.clip_high)
            plain, bounded = ratio * advantage, torch.clamp(ratio, 1 - grpo.clip, highest) * advantage
            distance = torch.exp(reference - now) - (reference - now) - 1
            each.append(-torch.minimum(plain, bounded) + grpo.beta * distance)
            divergence += distance.item() / len(own)
            clipped += bool(bounded < plain) / len(own)
        lengths = {"replies": len(each), "tokens": 1, "max_new_tokens": grpo.max_new_tokens}
        total = total + torch.stack(each).sum() / lengths[grpo.loss_mean]
    return total, divergence, clipped


SETTINGS = [
    GRPO(beta=0.04, clip=0.2),
    GRPO(beta=0.0, clip=0.05),
    GRPO(beta=0.04, clip=0.05, clip_high=0.4),  # DAPO's clip-higher
    GRPO(beta=0.0, clip=0.2, loss_mean="tokens"),  # DAPO's token-level loss
    GRPO(beta=0.04, clip=0.2, loss_mean="max_new_tokens", max_new_tokens=40),  # Dr. GRPO's constant length
]


@pytest.mark.parametrize("grpo", SETTINGS)
def test_packed_replies_are_single_replies(grpo: GRPO) -> None:
    batch, texts = packed()
    assert len(texts) == len(batch.advantages) >= 6
    model = made("llama")
    expected, divergence, clipped = spelt_out(model, grpo, batch, texts)
    expected.backward()
    theirs = gradients(model)
    loss = PolicyLoss(model, grpo)
    value = loss(batch)
    value.backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    same(gradients(model), theirs)
    assert float(loss.figures["kl"]) == pytest.approx(divergence, rel=1e-4)
    assert float(loss.figures["clipped"]) == pytest.approx(clipped)
    assert 0 < clipped < len(texts)
    assert float(loss.figures["reward"]) == sum(range(len(texts)))
    assert float(loss.figures["reply_tokens"]) == float(batch.is_target[:, 1:].sum())


def test_a_token_may_rise_further_than_it_may_fall() -> None:
    """Of tokens whose probability rose by 30%, none is clipped by 0.4; of those that fell by 30%, all of bad replies are by 0.2."""
    batch, texts = packed()
    model = made("llama")
    own = torch.zeros_like(batch.policy_log_probs)
    own.view(-1)[target_places(batch)] = (
        -PolicyLoss(model, GRPO())
        .targets.causal(batch.input_ids, batch.positions, target_places(batch), "none", batch.bounds)
        .detach()
    )
    clipped = {}
    for change, advantage in ((1.3, 1.0), (0.7, -1.0)):
        moved = batch._replace(
            policy_log_probs=own - float(np.log(change)), advantages=torch.full_like(batch.advantages, advantage)
        )
        for high in (None, 0.4):
            loss = PolicyLoss(model, GRPO(clip=0.2, clip_high=high))
            loss(moved)
            clipped[change, high] = float(loss.figures["clipped"]) / len(texts)
    assert clipped == pytest.approx({(1.3, None): 1.0, (1.3, 0.4): 0.0, (0.7, None): 1.0, (0.7, 0.4): 1.0})


def test_advantages_are_not_scaled_where_that_is_asked() -> None:
    rewards = torch.tensor([[1.0, 3.0], [5.0, 5.0], [0.0, 0.5]])
    torch.testing.assert_close(advantages(rewards, scale_rewards=False), torch.tensor([[-1.0, 1.0], [0.0, 0.0], [-0.25, 0.25]]))


def test_advantages_are_among_the_replies_to_one_prompt() -> None:
    values = advantages(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    torch.testing.assert_close(values, torch.tensor([[-(0.5**0.5), 0.5**0.5], [0.0, 0.0]]), rtol=1e-3, atol=1e-3)
