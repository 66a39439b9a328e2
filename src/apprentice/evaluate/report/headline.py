"""Headlines of a report: one sentence per difference of a pool, and a summary of the last subject. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from apprentice.evaluate.report.report_schema import Column, GroupEntry, Summary, TaskEntry, first_column_of

RELATIONS = {"better": "better than", "worse": "worse than", "unclear": "not clearly different from"}


def write_headlines(pools: Sequence[GroupEntry], columns: Sequence[Column]) -> list[str]:
    """One sentence per difference of each pool, with its verdict and interval."""
    titles = _titles(columns)
    sentences = []
    for pool in pools:
        for key, difference in pool.differences.items():
            low, high = difference.interval
            tasks = f"On {difference.tasks} {_name(pool)} task{'s' if (difference.tasks or 0) > 1 else ''}"
            sentences.append(
                f"{tasks} {titles[key]} is {RELATIONS[difference.verdict]} {titles[difference.against]}:"
                f" {difference.mean:+.1f} points (95% interval {low:+.1f} to {high:+.1f})."
            )
    return sentences


def write_summary(tasks: Sequence[TaskEntry], pools: Sequence[GroupEntry], columns: list[Column]) -> Summary:
    """Summary of the last subject at its fewest exemplars: its mean score over tasks, and a sentence about the pools."""
    column = first_column_of(columns[-1].subject, columns)
    cells = [task.columns[column.key] for task in tasks if column.key in task.columns]
    scores = [cell.score for cell in cells if cell.score is not None]
    parts = []
    for pool in pools:
        if difference := pool.differences.get(column.key):
            low, high = difference.interval
            parts.append(f"{_name(pool)} {difference.mean:+.1f} ({low:+.1f} to {high:+.1f})")
        elif mean := pool.columns.get(column.key):
            parts.append(f"{_name(pool)} {mean.mean:.1f}")
    against = f" against {_titles(columns)[column.against]}, points with 95% interval" if column.against else ""
    sentence = f"{column.title}{against}: {', '.join(parts) or 'too few rows to say'}"
    return Summary(score=float(np.mean(scores)) if scores else None, sentence=sentence)


def _name(pool: GroupEntry) -> str:
    return f"{pool.exposure.replace('_', '-')} {pool.kind}"


def _titles(columns: Sequence[Column]) -> Mapping[str, str]:
    return {column.key: column.title for column in columns}
