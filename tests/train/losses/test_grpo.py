"""GRPO's loss on packed replies against the formula spelt out token by token, each reply in a forward pass of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from apprentice.recipe import GRPO
from apprentice.train.batch import RolloutBatch
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
            plain, bounded = ratio * advantage, torch.clamp(ratio, 1 - grpo.clip, 1 + grpo.clip) * advantage
            distance = torch.exp(reference - now) - (reference - now) - 1
            each.append(-torch.minimum(plain, bounded) + grpo.beta * distance)
            divergence += distance.item() / len(own)
            clipped += bool(bounded < plain) / len(own)
        total = total + torch.stack(each).mean()
    return total, divergence, clipped


@pytest.mark.parametrize(("beta", "clip"), [(0.04, 0.2), (0.0, 0.05)])
def test_packed_replies_are_single_replies(beta: float, clip: float) -> None:
    grpo = GRPO(beta=beta, clip=clip)
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


def test_advantages_are_among_the_replies_to_one_prompt() -> None:
    values = advantages(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    torch.testing.assert_close(values, torch.tensor([[-(0.5**0.5), 0.5**0.5], [0.0, 0.0]]), rtol=1e-3, atol=1e-3)
