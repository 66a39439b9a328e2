"""How much an answer and a score depend on the wording of the question. Pure; knows nothing of models."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apprentice.evaluate.stats.metrics import label_of, normalised


@dataclass(frozen=True)
class Robustness:
    """Scores 0 to 100 over the wordings. `spread` is the distance between their quartiles."""

    wordings: Mapping[str, float]  # template → its score
    median: float
    worst: str
    spread: float


def robustness(wordings: Mapping[str, float]) -> Robustness:
    """The wordings' scores {a: 50, b: 60, c: 70} have median 60, spread 10 and worst wording a."""
    low, middle, high = np.quantile(list(wordings.values()), [0.25, 0.5, 0.75])
    return Robustness(dict(wordings), float(middle), min(wordings, key=lambda name: wordings[name]), float(high - low))


def answer_of(record: Mapping[str, Any]) -> Any:
    """What was answered, whatever its words: the place of the choice, or the normal form of the text."""
    return label_of(record["prediction"], record["choices"]) if record["choices"] else normalised(record["prediction"])


def agreement(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """`changed`: the share of rows (0 to 100) that get more than one answer; `consistency`: how often two askings of a row agree.

    Only rows asked more than once count; without any, both are None. Answers a a b of one row: changed 100, consistency 100/3.
    Consistency does not fall merely because more wordings were asked, so tasks with many and with few can be compared.
    """
    answers: dict[int, list[Any]] = defaultdict(list)
    for record in records:
        answers[record["row"]].append(answer_of(record))
    several = [Counter(met) for met in answers.values() if len(met) > 1]
    if not several:
        return {"changed": None, "consistency": None}
    alike = [sum(n * (n - 1) for n in met.values()) / (met.total() * (met.total() - 1)) for met in several]
    return {"changed": 100.0 * float(np.mean([len(met) > 1 for met in several])), "consistency": 100.0 * float(np.mean(alike))}
