"""95% intervals by bootstrap over rows, and a paired test: the wordings of a row stay together, two models meet the same resamples.

Pure numpy; knows nothing of tasks or models. The resamples of a key are always the same, so differences are paired by construction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apprentice.evaluate.metrics import Floats, Metric

CONFIDENCE = 0.95
RESAMPLES = 2_000
_CHUNK = 4_000_000  # numbers of one block of resampling weights (32 MB)


@dataclass(frozen=True)
class RowSums:
    """What a metric says of each row: its statistics summed over the row's wordings."""

    rows: NDArray[np.int64]  # (rows,), ascending
    sums: Floats  # (rows, width)
    counts: Floats  # (rows,), wordings met

    @classmethod
    def of(cls, rows: Sequence[int], statistics: Sequence[Sequence[float]] | Floats) -> RowSums:
        """Groups one vector per prediction by the prediction's row."""
        unique, place = np.unique(np.asarray(rows, dtype=np.int64), return_inverse=True)
        vectors = np.asarray(statistics, dtype=np.float64)
        sums = np.zeros((len(unique), vectors.shape[1]))
        np.add.at(sums, place, vectors)
        return cls(unique, sums, np.bincount(place, minlength=len(unique)).astype(np.float64))

    def only(self, rows: NDArray[np.int64]) -> RowSums:
        """The same for those of its rows that are in `rows`."""
        kept = np.isin(self.rows, rows)
        return RowSums(self.rows[kept], self.sums[kept], self.counts[kept])

    def score(self, metric: Metric) -> float:
        return float(metric.value(self.sums.sum(axis=0), self.counts.sum()))


def bootstrap(columns: Mapping[str, RowSums], metric: Metric, key: str, resamples: int = RESAMPLES) -> dict[str, Floats]:
    """Column → its score in each resample, shape (resamples,). All columns must hold the same rows."""
    rows = next(iter(columns.values())).rows
    if any(not np.array_equal(column.rows, rows) for column in columns.values()):
        raise ValueError("paired columns hold different rows")
    random = np.random.default_rng(list(hashlib.sha256(f"bootstrap {key}".encode()).digest()))
    share = np.full(len(rows), 1.0 / len(rows))
    step = max(1, _CHUNK // len(rows))
    parts: dict[str, list[Floats]] = {name: [] for name in columns}
    for start in range(0, resamples, step):
        times = random.multinomial(len(rows), share, size=min(step, resamples - start)).astype(np.float64)  # (resamples, rows)
        for name, column in columns.items():
            parts[name].append(metric.value(times @ column.sums, times @ column.counts))
    return {name: np.concatenate(found) for name, found in parts.items()}


def swapped(ours: RowSums, theirs: RowSums, metric: Metric, key: str, permutations: int = RESAMPLES) -> Floats:
    """The difference of the two scores after their answers to rows changed sides at random, shape (permutations,).

    What the difference would be if it did not matter which model answered: the paired randomisation test. Raises `ValueError` for
    columns that hold different rows.
    """
    if not np.array_equal(ours.rows, theirs.rows):
        raise ValueError("paired columns hold different rows")
    random = np.random.default_rng(list(hashlib.sha256(f"swapped {key}".encode()).digest()))
    step = max(1, _CHUNK // len(ours.rows))
    parts = []
    for start in range(0, permutations, step):
        sides = random.integers(0, 2, size=(min(step, permutations - start), len(ours.rows))).astype(np.float64)
        first = metric.value(sides @ ours.sums + (1 - sides) @ theirs.sums, sides @ ours.counts + (1 - sides) @ theirs.counts)
        second = metric.value((1 - sides) @ ours.sums + sides @ theirs.sums, (1 - sides) @ ours.counts + sides @ theirs.counts)
        parts.append(first - second)
    return np.concatenate(parts)


def p_value(difference: float, draws: Floats) -> float:
    """How often chance alone gives at least such a difference, in either direction; never 0, since the data are one such draw."""
    return float((1 + np.sum(np.abs(draws) >= abs(difference) - 1e-9)) / (1 + len(draws)))


def interval(draws: Floats, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentile interval of bootstrap draws."""
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return float(low), float(high)


def verdict(low: float, high: float, p: float = 0.0) -> str:
    """`better` or `worse` where the interval of a difference leaves zero out and the paired test agrees, else `unclear`.

    With few rows the interval alone is too sure of itself.
    """
    if p > 1.0 - CONFIDENCE:
        return "unclear"
    return "better" if low > 0 else "worse" if high < 0 else "unclear"
