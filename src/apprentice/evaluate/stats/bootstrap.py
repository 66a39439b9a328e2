"""Statistics of scores: 95% intervals, a paired randomisation test, and correction for multiple comparisons.

The unit is the row: all wordings of a row are resampled together.

    score, right or wrong             Wilson's interval [1], with Kish's effective number of independent answers [2]
    difference of two such scores     Newcombe's interval (method 10 [3])
    score or difference of others     percentile bootstrap; if all draws agree, Wilson's limits with one answer a row
    mean of several tasks             limits combined as squares (MOVER [4]), because tasks are independent
    better or worse                   p-value corrected for the number of comparisons (Benjamini and Hochberg [5])

Wilson's and Newcombe's intervals keep their width where all answers are right. The resamples of a key are always the same, so
differences are paired by construction.

[1] Wilson 1927, J. Am. Stat. Assoc. 22. [2] Kish 1965, Survey Sampling. [3] Newcombe 1998, Stat. Med. 17, 2635.
[4] Zou and Donner 2008, Stat. Med. 27. [5] Benjamini and Hochberg 1995, J. R. Stat. Soc. B 57.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from apprentice.evaluate.report.report_schema import Verdict
from apprentice.evaluate.stats.metrics import Floats, Metric

CONFIDENCE = 0.95
RESAMPLES = 2_000
Estimate = tuple[float, float, float]  # a value, and the ends of its 95% interval
_CHUNK = 4_000_000  # float64 numbers in a block of resampling weights (32 MB)


@dataclass(frozen=True)
class RowSums:
    """Statistics of a metric for each row, summed over the wordings of the row."""

    rows: NDArray[np.int64]  # (rows,), ascending
    sums: Floats  # (rows, width)
    counts: Floats  # (rows,), number of wordings

    @classmethod
    def of(cls, rows: Sequence[int], statistics: Sequence[Sequence[float]] | Floats) -> RowSums:
        """Sums `statistics` (predictions, width) by row; `rows[i]` is the row of prediction i."""
        unique, place = np.unique(np.asarray(rows, dtype=np.int64), return_inverse=True)
        vectors = np.asarray(statistics, dtype=np.float64)
        sums = np.zeros((len(unique), vectors.shape[1]))
        np.add.at(sums, place, vectors)
        return cls(unique, sums, np.bincount(place, minlength=len(unique)).astype(np.float64))

    def only(self, rows: NDArray[np.int64]) -> RowSums:
        """Selects the rows that are in `rows`."""
        kept = np.isin(self.rows, rows)
        return RowSums(self.rows[kept], self.sums[kept], self.counts[kept])

    def score(self, metric: Metric) -> float:
        """Score of all rows together."""
        return float(metric.value(self.sums.sum(axis=0), self.counts.sum()))


def bootstrap(columns: Mapping[str, RowSums], metric: Metric, key: str, resamples: int = RESAMPLES) -> dict[str, Floats]:
    """Resamples rows with replacement: column → its scores, shape (resamples,). `key` seeds the resamples.

    Raises `ValueError` unless all columns have the same rows.
    """
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
    return {name: np.concatenate(scores) for name, scores in parts.items()}


def permuted_differences(ours: RowSums, theirs: RowSums, metric: Metric, key: str, permutations: int = RESAMPLES) -> Floats:
    """Paired randomisation test: differences of the two scores with rows swapped at random, shape (permutations,).

    This is the distribution of the difference if it did not matter which model answered. Raises `ValueError` unless both columns
    have the same rows.
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
    """Two-sided p-value: how often a draw is at least as large as `difference`; never 0, since the data count as one draw."""
    return float((1 + np.sum(np.abs(draws) >= abs(difference) - 1e-9)) / (1 + len(draws)))


def percentiles(draws: Floats) -> tuple[float, float]:
    """Percentile interval of bootstrap draws."""
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return float(low), float(high)


def score_interval(column: RowSums, metric: Metric, key: str, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95% interval (low, high) of a column's score; the module's docstring says by which method."""
    if metric.binary:
        return _wilson(column.score(metric), _independent(column), 0.0)
    low, high = percentiles(bootstrap({"": column}, metric, key, resamples)[""])
    return (low, high) if high > low else _wilson(column.score(metric), len(column.rows), metric.least)


def difference_interval(
    ours: RowSums, theirs: RowSums, metric: Metric, key: str, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95% interval of the difference `ours` - `theirs` of two scores. Raises `ValueError` unless both have the same rows."""
    if not np.array_equal(ours.rows, theirs.rows):
        raise ValueError("paired columns hold different rows")
    if not metric.binary:
        draws = bootstrap({"ours": ours, "theirs": theirs}, metric, key, resamples)
        low, high = percentiles(draws["ours"] - draws["theirs"])
        if high > low:
            return low, high
    sides = [(column.score(metric), *score_interval(column, metric, key, resamples)) for column in (ours, theirs)]
    return _difference(sides[0], sides[1], _correlation(ours, theirs) if metric.binary else 0.0)


def mean_interval(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """95% interval of the mean of independent estimates (value, low, high)."""
    values, lows, highs = np.array(estimates).T
    below, above = (float(np.sqrt(np.square(gaps).sum())) / len(values) for gaps in (values - lows, highs - values))
    return float(values.mean()) - below, float(values.mean()) + above


def independent_difference_interval(ours: Estimate, theirs: Estimate) -> tuple[float, float]:
    """95% interval of the difference of two independent estimates (value, low, high)."""
    return _difference(ours, theirs, 0.0)


def adjust_p_values(values: Sequence[float]) -> list[float]:
    """p-values of several comparisons, corrected for their number (Benjamini and Hochberg)."""
    return [float(value) for value in stats.false_discovery_control(values, method="bh")] if values else []


def verdict(low: float, high: float, p: float) -> Verdict:
    """`better` or `worse` if the interval of a difference excludes zero and the adjusted `p` is at most 0.05, else `unclear`."""
    if p > 1.0 - CONFIDENCE:
        return "unclear"
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def _wilson(score: float, count: float, least: float) -> tuple[float, float]:
    """Wilson's limits of a score between `least` and 100, treated as the share of right answers among `count`."""
    z = float(stats.norm.ppf((1.0 + CONFIDENCE) / 2))
    width = 100.0 - least
    share = min(1.0, max(0.0, (score - least) / width))
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    # At the edges the limit is exactly the edge, without rounding.
    low, high = (0.0 if share == 0.0 else middle - half), (1.0 if share == 1.0 else middle + half)
    return least + width * float(low), least + width * float(high)


def _residuals(column: RowSums) -> Floats:
    """Right answers of each row minus the number expected from the overall score, shape (rows,)."""
    return np.asarray(column.sums[:, 0] - column.counts * (column.sums[:, 0].sum() / column.counts.sum()))


def _independent(column: RowSums) -> float:
    """Effective number of independent answers: between the number of rows (wordings agree) and that of all answers."""
    rows, answers = len(column.rows), float(column.counts.sum())
    share = float(column.sums[:, 0].sum()) / answers
    variance = float(np.square(_residuals(column)).sum()) / answers**2
    return min(answers, max(rows, share * (1 - share) / variance)) if variance > 0 else rows


def _correlation(ours: RowSums, theirs: RowSums) -> float:
    """Correlation of two columns' right answers, with Newcombe's continuity correction; 0 where one is constant."""
    one, other = _residuals(ours), _residuals(theirs)
    rows = len(one)
    each = float(ours.counts.mean() * theirs.counts.mean())
    spread = float(np.sqrt(np.square(one).mean() * np.square(other).mean()))
    if spread == 0.0:
        return 0.0
    shared = float((one * other).mean())
    if shared > 0:
        shared = max(0.0, shared - each / (2 * rows))
    return shared / spread


def _difference(ours: Estimate, theirs: Estimate, correlation: float) -> tuple[float, float]:
    """Limits of `ours` - `theirs`, each (value, low, high), given the correlation of the two."""
    (one, one_low, one_high), (other, other_low, other_high) = ours, theirs

    def reach(first: float, second: float) -> float:
        return float(np.sqrt(max(0.0, first**2 - 2 * correlation * first * second + second**2)))

    return one - other - reach(one - one_low, other_high - other), one - other + reach(one_high - one, other - other_low)
