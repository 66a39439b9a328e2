"""What a reward model says: the number that its last layer gives at an answer's last token, for many packed answers at once.

transformers' own models of this kind give one number a row, that of the last token that is no padding. Here a hook takes the
layer's numbers at all places, so that the answers of a packed row each have theirs. Knows nothing of losses or of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apprentice.models.loading import SCORE

BATCH_TOKENS = 4096


def is_reward(model: Any) -> bool:
    """Whether `model` gives numbers and no words."""
    return hasattr(model, SCORE)


def token_rewards(model: nn.Module, input_ids: Tensor, positions: Tensor | None) -> Tensor:
    """What the last layer gives at every place, float32; all shapes (rows, length)."""
    held: list[Tensor] = []
    [layer] = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == SCORE]
    hook = layer.register_forward_hook(lambda _, __, output: held.append(output))
    given: dict[str, Any] = {"input_ids": input_ids} | ({} if positions is None else {"position_ids": positions})
    try:
        model(**given, use_cache=False)
    finally:
        hook.remove()
    return held[-1][..., 0].float()


def choice_rewards(
    model: Any, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]], batch_tokens: int = BATCH_TOKENS
) -> list[list[float]]:
    """The reward of every choice after its prompt, in the order of the arguments; `batch_tokens` bounds one forward pass."""
    texts = [[*prompt, *ids] for prompt, group in zip(prompts, choices, strict=True) for ids in group]
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found = [0.0] * len(texts)
    while order:
        most = max(1, batch_tokens // len(texts[order[-1]]))
        together, order = order[-most:], order[:-most]
        lengths = torch.tensor([len(texts[place]) for place in together])
        ids = torch.zeros(len(together), int(lengths.max()), dtype=torch.long)
        for row, place in enumerate(together):
            ids[row, : len(texts[place])] = torch.tensor(texts[place])
        with torch.no_grad():  # what stands behind a text does not change what was said before it
            rewards = token_rewards(model, ids.to(model.device), None).cpu()
        for place, value in zip(together, rewards[torch.arange(len(together)), lengths - 1].tolist(), strict=True):
            found[place] = value
    given = iter(found)
    return [[next(given) for _ in group] for group in choices]
