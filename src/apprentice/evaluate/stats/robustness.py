"""Robustness: how much answers and scores depend on the wording of the question. Pure functions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apprentice.evaluate.stats.metrics import label_of, normalise_squad


@dataclass(frozen=True)
class Robustness:
    """Robustness of a score over wordings, 0 to 100. `worst` names a wording; `spread` is the interquartile range."""

    wordings: Mapping[str, float]  # template → its score
    median: float
    worst: str
    spread: float


@dataclass(frozen=True)
class Agreement:
    """Agreement of the answers to a row, 0 to 100; None where no row was asked more than once.

    `changed` is the share of rows that get more than one answer, `consistency` how often two answers to the same row agree.
    """

    changed: float | None
    consistency: float | None


def robustness(wordings: Mapping[str, float]) -> Robustness:
    """Summary of the scores of wordings: {a: 50, b: 60, c: 70} has median 60, spread 10 and worst wording a."""
    low, middle, high = np.quantile(list(wordings.values()), [0.25, 0.5, 0.75])
    return Robustness(dict(wordings), float(middle), min(wordings, key=lambda name: wordings[name]), float(high - low))


def comparable_answer(record: Mapping[str, Any]) -> Any:
    """Answer of a record in comparable form: the index of the choice, or the text in SQuAD's normal form."""
    return label_of(record["prediction"], record["choices"]) if record["choices"] else normalise_squad(record["prediction"])


def agreement(records: Sequence[Mapping[str, Any]]) -> Agreement:
    """Agreement of the answers to each row; only rows asked more than once count.

    Answers a a b to one row: changed 100, consistency 100/3. Consistency does not fall merely because more wordings were asked, so
    tasks with many and with few wordings can be compared.
    """
    answers: dict[int, list[Any]] = defaultdict(list)
    for record in records:
        answers[record["row"]].append(comparable_answer(record))
    counts = [Counter(row_answers) for row_answers in answers.values() if len(row_answers) > 1]
    if not counts:
        return Agreement(None, None)
    alike = [sum(n * (n - 1) for n in count.values()) / (count.total() * (count.total() - 1)) for count in counts]
    return Agreement(100.0 * float(np.mean([len(count) > 1 for count in counts])), 100.0 * float(np.mean(alike)))
