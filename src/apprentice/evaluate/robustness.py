"""How much a score depends on the wording of the question: mean, worst wording, spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Robustness:
    """Scores 0 to 100. `spread` is the distance between the quartiles of the wordings' scores."""

    wordings: Mapping[str, float]  # template → its score
    worst: str
    spread: float


def robustness(wordings: Mapping[str, float]) -> Robustness:
    """The wordings' scores {a: 50, b: 60, c: 70} have spread 10 and worst wording a."""
    quartiles = np.quantile(list(wordings.values()), [0.25, 0.75])
    return Robustness(dict(wordings), min(wordings, key=lambda name: wordings[name]), float(quartiles[1] - quartiles[0]))
