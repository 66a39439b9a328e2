"""Comparison of columns: paired differences in a task, their means over groups of tasks, verdicts corrected for their number.

    answers of two columns ── compare_columns ──▶ comparisons of a task ── compare_groups ──▶ comparisons of a pool or cluster
    all comparisons of one table ── adjust_comparisons ──▶ differences with adjusted p-value and verdict

Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from apprentice.evaluate.report.report_schema import Column, Difference, Interval
from apprentice.evaluate.stats.bootstrap import (
    adjust_p_values,
    difference_interval,
    mean_interval,
    p_value,
    permuted_differences,
    verdict,
)
from apprentice.evaluate.stats.metrics import METRICS, Floats
from apprentice.evaluate.stats.task_scores import AnswerStatistics, paired_rows


@dataclass(frozen=True)
class Comparison:
    """Difference of a column and the column `against`, before the correction for the number of comparisons.

    `draws` are the differences with rows swapped at random, shape (permutations,). A comparison in a task counts the `rows` that
    both columns answered, one of a group its `tasks`.
    """

    against: str
    mean: float
    interval: Interval
    p: float
    draws: Floats
    rows: int | None = None
    tasks: int | None = None


def compare_columns(
    answers: Mapping[str, AnswerStatistics], columns: Sequence[Column], metric_name: str, key: str, resamples: int
) -> dict[str, Comparison]:
    """Column → its comparison in one task, over the rows that both columns answered; `key` seeds the resamples."""
    metric = METRICS[metric_name]
    comparisons: dict[str, Comparison] = {}
    for column in columns:
        if column.against is None or column.key not in answers or column.against not in answers:
            continue
        pair = paired_rows(answers[column.key], answers[column.against], metric_name)
        if pair is None:
            continue
        draws = permuted_differences(*pair, metric, key, resamples)
        mean = pair[0].score(metric) - pair[1].score(metric)
        interval = difference_interval(*pair, metric, key, resamples)
        comparisons[column.key] = Comparison(column.against, mean, interval, p_value(mean, draws), draws, rows=len(pair[0].rows))
    return comparisons


def compare_groups(tasks: Sequence[Mapping[str, Comparison]], columns: Sequence[Column]) -> dict[str, Comparison]:
    """Column → mean of its comparisons in several tasks, all weighted the same; rows are permuted within their task."""
    means: dict[str, Comparison] = {}
    for column in columns:
        members = [task[column.key] for task in tasks if column.key in task]
        if column.against is None or not members:
            continue
        mean = float(np.mean([member.mean for member in members]))
        draws = np.mean([member.draws for member in members], axis=0)
        interval = mean_interval([(member.mean, *member.interval) for member in members])
        means[column.key] = Comparison(column.against, mean, interval, p_value(mean, draws), draws, tasks=len(members))
    return means


def adjust_comparisons(lines: Sequence[Mapping[str, Comparison]]) -> list[dict[str, Difference]]:
    """Differences of all lines of one table, with p-values corrected for their number, and verdicts."""
    adjusted = iter(adjust_p_values([comparison.p for line in lines for comparison in line.values()]))
    return [{key: _difference(comparison, next(adjusted)) for key, comparison in line.items()} for line in lines]


def _difference(comparison: Comparison, p_adjusted: float) -> Difference:
    sizes = {name: size for name, size in (("rows", comparison.rows), ("tasks", comparison.tasks)) if size is not None}
    return Difference(
        against=comparison.against,
        **sizes,
        mean=comparison.mean,
        interval=comparison.interval,
        p=comparison.p,
        p_adjusted=p_adjusted,
        verdict=verdict(*comparison.interval, p_adjusted),
    )
