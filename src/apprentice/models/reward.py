"""Rewards of a reward model: the output of its last layer at the last token of each answer, for many answers at once.

transformers' reward models return one number a row, at the last token that is no padding. Here a forward hook takes the output at
every token, so that each answer of a packed row has its reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apprentice.models.loading import REWARD_HEAD

BATCH_TOKENS = 4096


def is_reward(model: Any) -> bool:
    """True for a reward model, which outputs a number instead of text."""
    return hasattr(model, REWARD_HEAD)


def token_rewards(model: nn.Module, input_ids: Tensor, **arguments: Any) -> Tensor:
    """Reward at every token, float32 (rows, length); `input_ids` is int64 of that shape, `arguments` are others of the model."""
    outputs: list[Tensor] = []
    [layer] = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == REWARD_HEAD]
    hook = layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        model(input_ids=input_ids, **arguments, use_cache=False)
    finally:
        hook.remove()
    return outputs[-1][..., 0].float()


def choice_rewards(
    model: Any, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]], batch_tokens: int = BATCH_TOKENS
) -> list[list[float]]:
    """Reward of every choice (token ids) after its prompt, in the order of the arguments.

    `batch_tokens` bounds the tokens, padding included, of one forward pass; a longer text runs alone.
    """
    texts = [[*prompt, *ids] for prompt, group in zip(prompts, choices, strict=True) for ids in group]
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    values = [0.0] * len(texts)
    while order:
        count = max(1, batch_tokens // len(texts[order[-1]]))
        batch, order = order[-count:], order[:-count]
        lengths = torch.tensor([len(texts[place]) for place in batch])
        ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long)
        for row, place in enumerate(batch):
            ids[row, : len(texts[place])] = torch.tensor(texts[place])
        with torch.no_grad():  # the model is causal, so the padding after a text does not change its reward
            rewards = token_rewards(model, ids.to(model.device)).cpu()
        for place, value in zip(batch, rewards[torch.arange(len(batch)), lengths - 1].tolist(), strict=True):
            values[place] = value
    in_order = iter(values)
    return [[next(in_order) for _ in group] for group in choices]
