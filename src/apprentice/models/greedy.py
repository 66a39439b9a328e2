"""Greedy replies of a model in memory, with the margin by which each token was the best: what another program must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from apprentice.models.loading import load_model


class GreedyReply(NamedTuple):
    """Token ids of a greedy reply, its end among them, and for each by how much its logit exceeds the second best."""

    ids: tuple[int, ...]
    margins: tuple[float, ...]


@torch.no_grad()
def reply_greedily(
    folder: Path, prompts: Sequence[Sequence[int]], stops: Sequence[int], most: int, *, trust: bool = False
) -> list[GreedyReply]:
    """Greedy replies of the model in `folder` to prompts of token ids, in float32 on the CPU, of `most` tokens at most each.

    Each token is computed from the whole text before it, without a cache. Raises `ModelError` if the model cannot be loaded.
    """
    model: Any = load_model(folder, torch.float32, trust=trust)
    start = [model.config.decoder_start_token_id] if model.config.is_encoder_decoder else []
    replies = []
    for prompt in prompts:
        ids: list[int] = []
        margins: list[float] = []
        while len(ids) < most and not (ids and ids[-1] in stops):
            inputs = {"input_ids": [*prompt], "decoder_input_ids": [*start, *ids]} if start else {"input_ids": [*prompt, *ids]}
            logits = model(**{name: torch.tensor([value]) for name, value in inputs.items()}, use_cache=False).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            ids.append(int(logits.argmax()))
            margins.append(best - second)
        replies.append(GreedyReply(tuple(ids), tuple(margins)))
    return replies
