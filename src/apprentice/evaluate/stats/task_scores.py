"""Scores of one task in one column (a subject at one number of exemplars), with intervals, wordings and perturbations.

Perturbed questions never enter a score; they only measure how stable the answers are. Pure functions.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apprentice.evaluate.stats.bootstrap import RowSums, score_interval
from apprentice.evaluate.stats.metrics import METRICS, Floats, label_of
from apprentice.evaluate.stats.robustness import agreement, robustness

Record = Mapping[str, Any]


@dataclass(frozen=True)
class AnswerStatistics:
    """Answered questions of one task in one column, without perturbed ones, with the statistics of each metric."""

    records: Sequence[Record]
    statistics: Mapping[str, Floats]  # metric → (questions, width)

    @classmethod
    def of(cls, records: Sequence[Record], metrics: Sequence[str]) -> AnswerStatistics:
        asked = [record for record in records if record["prediction"] is not None and not record["perturbation"]]
        answers = [(record["prediction"], record["references"], record["choices"]) for record in asked]
        return cls(asked, {name: METRICS[name].statistics_of(answers) for name in metrics})

    def by_row(self, metric: str, template: str | None = None, only: frozenset[Any] | None = None) -> RowSums:
        """Statistics summed by row; limited to the wording `template`, and to the questions `only` (`pair_key`), if given."""
        chosen = [
            number
            for number, record in enumerate(self.records)
            if template in (None, record["template"]) and (only is None or pair_key(record) in only)
        ]
        return RowSums.of([self.records[number]["row"] for number in chosen], self.statistics[metric][chosen])


def pair_key(record: Record) -> tuple[int, str]:
    """Key that is equal for the same question to two models."""
    return record["row"], record["template"]


def paired(ours: AnswerStatistics, theirs: AnswerStatistics, metric: str) -> tuple[RowSums, RowSums] | None:
    """Row sums of both columns over the questions that both answered; None if there is no such question."""
    shared = frozenset(map(pair_key, ours.records)) & frozenset(map(pair_key, theirs.records))
    if not shared:
        return None
    first, second = ours.by_row(metric, only=shared), theirs.by_row(metric, only=shared)
    width = max(first.sums.shape[1], second.sums.shape[1])
    return _widened(first, width), _widened(second, width)


def _widened(column: RowSums, width: int) -> RowSums:
    missing = width - column.sums.shape[1]
    return RowSums(column.rows, np.pad(column.sums, ((0, 0), (0, missing))), column.counts) if missing else column


def counts(records: Sequence[Record]) -> dict[str, Any]:
    """Number of questions, and of those that were truncated, dropped or not answered."""
    plain = [record for record in records if not record["perturbation"]]
    return {
        "questions": len(plain),
        "truncated": dict(Counter(record["truncated"] for record in plain if record["truncated"])),
        "dropped": dict(Counter(record["dropped"] for record in plain if record["dropped"])),
        "unscored": sum(bool(record["unscored"]) for record in records),
        "score": None,  # stays None if no question has an answer
    }


def scores(scored: AnswerStatistics, records: Sequence[Record], metrics: Sequence[str], key: str, resamples: int) -> dict[str, Any]:
    """Cell of the report (`report_schema.ColumnScores`) for one task in one column; intervals and wordings use the first metric.

    `key` and `resamples` are those of the bootstrap.
    """
    main = METRICS[metrics[0]]
    asked = Counter(record["template"] for record in scored.records)
    wordings = {name: scored.by_row(metrics[0], name).score(main) for name in sorted(asked)}
    spread = robustness(wordings)
    found = {name: scored.by_row(name).score(METRICS[name]) for name in metrics}
    answered = [record for record in records if record["prediction"] is not None]
    return {
        "score": found[metrics[0]],
        "interval": list(score_interval(scored.by_row(metrics[0]), main, key, resamples)),
        "metrics": found,
        "rows": len({record["row"] for record in scored.records}),
        "wordings": {name: {"score": score, "questions": asked[name]} for name, score in wordings.items()},
        "median": spread.median,
        "worst": wordings[spread.worst],
        "worst_wording": spread.worst,
        "worst_interval": list(score_interval(scored.by_row(metrics[0], spread.worst), main, key, resamples)),
        "spread": spread.spread,
        "changed": agreement(scored.records)["changed"],
        "consistency": agreement(answered)["consistency"],
        "perturbations": _perturbations(scored, answered),
        "labels": _labels(scored.records),
        "exemplars": float(np.mean([len(record["exemplars"] or []) for record in scored.records])),
        "prompt_tokens": float(np.mean([record["prompt_tokens"] or 0 for record in scored.records])),
    }


def _perturbations(scored: AnswerStatistics, answered: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Perturbation → its score, the score of the same questions unperturbed, and the share of rows (0 to 100) that `changed`."""
    shots = {record["shots"] for record in scored.records}
    plain = {pair_key(record): record for record in scored.records}
    kinds: dict[str, list[tuple[Record, Record]]] = defaultdict(list)
    for record in answered:
        if record["perturbation"] and record["shots"] in shots and pair_key(record) in plain:
            kinds[record["perturbation"]].append((record, plain[pair_key(record)]))
    return {
        kind: {
            "questions": len(pairs),
            "score": float(np.mean([changed["score"] for changed, _ in pairs])),
            "unchanged_score": float(np.mean([as_it_was["score"] for _, as_it_was in pairs])),
            "changed": agreement([record for pair in pairs for record in pair])["changed"],
        }
        for kind, pairs in sorted(kinds.items())
    }


def _labels(records: Sequence[Record]) -> list[dict[str, Any]] | None:
    """Share (0 to 100) of each choice among predictions and right answers; None unless all questions have as many choices."""
    sizes = {len(record["choices"]) for record in records}
    if len(sizes) != 1 or not max(sizes):
        return None
    said = Counter(label_of(record["prediction"], record["choices"]) for record in records)
    right = Counter(label_of(record["target"], record["choices"]) for record in records)
    total = len(records)
    return [
        {"choice": choice, "said": 100 * said[place] / total, "right": 100 * right[place] / total}
        for place, choice in enumerate(records[0]["choices"])
    ]
