"""Which token comes next: the most probable one, or one drawn by a counter-based generator.

The draw for token n of a request depends on the request's seed and n alone, never on what else runs. Knows nothing of batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 takes the most probable token; `top_p` keeps the fewest tokens that together have that probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


GREEDY = Sampling()


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that is a pure function of `seed` (any integer) and `step` (0, 1, …)."""
    key = seed % 2**64
    return float(np.random.Generator(np.random.Philox(key=key, counter=[0, step, 0, 0])).random())


def draw(logits: torch.Tensor, sampling: Sampling, step: int) -> int:
    """The id of token number `step`, from `logits` (vocabulary)."""
    if sampling.is_greedy:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    ids: torch.Tensor | None = None
    if sampling.top_p < 1.0:
        probabilities, ids = probabilities.sort(descending=True, stable=True)
        before = probabilities.cumsum(0) - probabilities
        kept = max(1, int((before < sampling.top_p).sum()))
        probabilities, ids = probabilities[:kept], ids[:kept]
    cumulative = probabilities.cumsum(0)
    point = uniform(sampling.seed, step) * float(cumulative[-1])
    place = min(int(torch.searchsorted(cumulative, torch.tensor(point, dtype=torch.float64), right=True)), len(cumulative) - 1)
    return place if ids is None else int(ids[place])
