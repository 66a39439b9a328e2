"""Log-probabilities of given tokens under a model's logits, and of the most probable tokens beside each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apprentice.inference.generation_request import ScoredToken

_ROWS_AT_ONCE = 128  # rows whose log-probabilities are computed at once


def score_tokens(logits: Tensor, ids: Sequence[int], tops: Sequence[int]) -> list[ScoredToken]:
    """Scores each of `ids` under its row of `logits` (ids, vocabulary), with the `tops[row]` most probable tokens."""
    scores: list[ScoredToken] = []
    for first in range(0, len(ids), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        rows = logits[part].float()
        targets = torch.tensor(list(ids[part]), device=rows.device)[:, None]
        totals = rows.logsumexp(dim=-1, keepdim=True)
        logprobs = (rows.gather(1, targets) - totals)[:, 0].tolist()
        most = min(max(tops[part]), rows.shape[-1])
        best, best_ids = (rows.topk(most, dim=-1)) if most else (totals[:, :0], targets[:, :0])
        values, names = (best - totals).tolist(), best_ids.tolist()
        for row, (id, count) in enumerate(zip(ids[part], tops[part], strict=True)):
            scores.append(ScoredToken(int(id), logprobs[row], tuple(zip(names[row][:count], values[row][:count], strict=True))))
    return scores
