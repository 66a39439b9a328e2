"""Sampler: temperature, top-p, penalties, logit bias and constraints, for a batch of requests.

Random numbers come from a counter-based generator (Philox), so the draw for token n of a request depends on the request's seed and
n alone, never on the other requests of the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from apprentice.inference.generation_request import Constraint, Sampling

_NUCLEUS = 512  # most probable tokens that top_p is tried on before the whole vocabulary is sorted


def uniform(seed: int, step: int) -> float:
    """Random number in [0, 1), a pure function of `seed` (any integer) and `step` (0, 1, …)."""
    key = seed % 2**64
    return float(np.random.Generator(np.random.Philox(key=key, counter=[0, step, 0, 0])).random())


def adjust(logits: Tensor, sampling: Sampling, reply_counts: Counter[int], constraint: Constraint | None) -> Tensor:
    """Applies bias, penalties and the constraint to `logits` (vocabulary); `reply_counts` is how often the reply has each token.

    Returns a new float32 tensor, -inf for tokens that the constraint forbids.
    """
    changed = logits.float().clone()
    penalties = {id: sampling.presence_penalty + count * sampling.frequency_penalty for id, count in reply_counts.items()}
    for numbers, sign in ((sampling.bias, 1.0), (penalties, -1.0)):
        if numbers:
            ids = torch.tensor(list(numbers), device=changed.device)
            changed[ids] += sign * torch.tensor(list(numbers.values()), dtype=torch.float32, device=changed.device)
    if constraint is not None:
        allowed = np.zeros(len(changed), dtype=bool)
        known = constraint.allowed()[: len(changed)]
        allowed[: len(known)] = known
        changed[torch.from_numpy(~allowed).to(changed.device)] = float("-inf")
    return changed


def draw(logits: Tensor, samplings: Sequence[Sampling], steps: Sequence[int]) -> list[int]:
    """Chooses a token id for each row of `logits` (requests, vocabulary); `steps[row]` is the token's index in its reply."""
    chosen: list[int] = logits.max(dim=-1).indices.tolist()  # as `argmax`, which takes five times as long in bfloat16 on a CPU
    drawn = [row for row, sampling in enumerate(samplings) if not sampling.is_greedy]
    if not drawn:
        return chosen
    device = logits.device

    def of_drawn(values: Sequence[float]) -> Tensor:
        return torch.tensor([values[row] for row in drawn], dtype=torch.float64, device=device)[:, None]

    temperatures = of_drawn([sampling.temperature for sampling in samplings])
    points = of_drawn([uniform(sampling.seed, step) for sampling, step in zip(samplings, steps, strict=True)])
    shares = of_drawn([sampling.top_p for sampling in samplings])
    probabilities = torch.softmax(logits[drawn].double() / temperatures, dim=-1)
    whole = [place for place, row in enumerate(drawn) if samplings[row].top_p >= 1.0]
    nucleus = [place for place, row in enumerate(drawn) if samplings[row].top_p < 1.0]
    ids_drawn: dict[int, int] = {}
    if whole:
        ids_drawn |= zip(whole, _sample(probabilities[whole], points[whole]), strict=True)
    if nucleus:
        ids_drawn |= zip(nucleus, _sample_nucleus(probabilities[nucleus], shares[nucleus], points[nucleus]), strict=True)
    for place, row in enumerate(drawn):
        chosen[row] = ids_drawn[place]
    return chosen


def _sample(probabilities: Tensor, points: Tensor) -> list[int]:
    """Inverse-CDF sampling: for each row the index where the running sum passes `points` (rows, 1) times the row's sum.

    An index with probability 0 is never chosen.
    """
    cumulative = probabilities.cumsum(dim=-1)
    places = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)[:, 0]
    last = (probabilities > 0).long().cumsum(dim=-1).argmax(dim=-1)  # rounding may carry a point past the last weight
    return torch.minimum(places, last).tolist()


def _sample_nucleus(probabilities: Tensor, shares: Tensor, points: Tensor) -> list[int]:
    """Top-p sampling: `_sample` among the fewest tokens of each row that together have `shares` (rows, 1) of the probability."""
    best, ids = probabilities.topk(min(_NUCLEUS, probabilities.shape[-1]), dim=-1)
    ids_drawn = _sample_best(best, ids, shares, points)
    if best.shape[-1] < probabilities.shape[-1]:
        for row in (best.sum(dim=-1, keepdim=True) < shares)[:, 0].nonzero()[:, 0].tolist():
            one = slice(row, row + 1)
            values, order = probabilities[one].sort(dim=-1, descending=True, stable=True)
            ids_drawn[row] = _sample_best(values, order, shares[one], points[one])[0]
    return ids_drawn


def _sample_best(best: Tensor, ids: Tensor, shares: Tensor, points: Tensor) -> list[int]:
    outside = best.cumsum(dim=-1) - best >= shares
    outside[:, 0] = False
    places = _sample(best.masked_fill(outside, 0.0), points)
    return [int(row[place]) for row, place in zip(ids, places, strict=True)]
