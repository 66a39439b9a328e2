"""Scores of one task in one column (a subject at one number of exemplars), with intervals, wordings and perturbations.

Perturbed questions never enter a score; they only measure how stable the answers are. Pure functions.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apprentice.evaluate.report.report_schema import ColumnScores, LabelShares, PerturbationScore, WordingScore
from apprentice.evaluate.stats.bootstrap import RowSums, score_interval
from apprentice.evaluate.stats.metrics import METRICS, Floats, label_of
from apprentice.evaluate.stats.robustness import agreement, robustness

Record = Mapping[str, Any]
QuestionKey = tuple[int, str]  # row and template


@dataclass(frozen=True)
class AnswerStatistics:
    """Answered questions of one task in one column, without perturbed ones, with the statistics of each metric."""

    records: Sequence[Record]
    statistics: Mapping[str, Floats]  # metric → (questions, width)

    @classmethod
    def of(cls, records: Sequence[Record], metrics: Sequence[str]) -> AnswerStatistics:
        """Statistics of the answered and unperturbed questions among `records`, by each of `metrics`."""
        plain = [record for record in records if record["prediction"] is not None and not record["perturbation"]]
        answers = [(record["prediction"], record["references"], record["choices"]) for record in plain]
        return cls(plain, {name: METRICS[name].statistics_of(answers) for name in metrics})

    def by_row(self, metric: str, template: str | None = None, only: frozenset[QuestionKey] | None = None) -> RowSums:
        """Statistics summed by row; limited to the wording `template`, and to the questions `only`, if given."""
        chosen = [
            number
            for number, record in enumerate(self.records)
            if template in (None, record["template"]) and (only is None or question_key(record) in only)
        ]
        return RowSums.of([self.records[number]["row"] for number in chosen], self.statistics[metric][chosen])


def question_key(record: Record) -> QuestionKey:
    """Key that is equal for the same question to two models."""
    return record["row"], record["template"]


def paired_rows(ours: AnswerStatistics, theirs: AnswerStatistics, metric: str) -> tuple[RowSums, RowSums] | None:
    """Row sums of both columns over the questions that both answered; None if there is no such question."""
    shared = frozenset(map(question_key, ours.records)) & frozenset(map(question_key, theirs.records))
    if not shared:
        return None
    first, second = ours.by_row(metric, only=shared), theirs.by_row(metric, only=shared)
    width = max(first.sums.shape[1], second.sums.shape[1])
    return _widened(first, width), _widened(second, width)


def _widened(column: RowSums, width: int) -> RowSums:
    missing = width - column.sums.shape[1]
    return RowSums(column.rows, np.pad(column.sums, ((0, 0), (0, missing))), column.counts) if missing else column


def score_column(
    answers: AnswerStatistics, records: Sequence[Record], metrics: Sequence[str], key: str, resamples: int
) -> ColumnScores:
    """Scores of one task in one column: counts of its questions and, if any has an answer, scores with intervals.

    `answers` are those of `records`, all questions of the task in this column. Intervals and wordings use the first metric. `key`
    and `resamples` are those of the bootstrap.
    """
    counts = _count_questions(records)
    if not answers.records:
        return ColumnScores(**counts, score=None)
    metric = METRICS[metrics[0]]
    sums = {name: answers.by_row(name) for name in metrics}
    values = {name: sums[name].score(METRICS[name]) for name in metrics}
    questions = Counter(record["template"] for record in answers.records)
    wordings = {name: answers.by_row(metrics[0], name) for name in sorted(questions)}
    scores = {name: rows.score(metric) for name, rows in wordings.items()}
    spread = robustness(scores)
    answered = [record for record in records if record["prediction"] is not None]
    return ColumnScores(
        **counts,
        score=values[metrics[0]],
        interval=score_interval(sums[metrics[0]], metric, key, resamples),
        metrics=values,
        rows=len({record["row"] for record in answers.records}),
        wordings={name: WordingScore(score=score, questions=questions[name]) for name, score in scores.items()},
        median=spread.median,
        worst=scores[spread.worst],
        worst_wording=spread.worst,
        worst_interval=score_interval(wordings[spread.worst], metric, key, resamples),
        spread=spread.spread,
        changed=agreement(answers.records).changed,
        consistency=agreement(answered).consistency,
        perturbations=_perturbations(answers, answered),
        labels=_labels(answers.records),
        exemplars=float(np.mean([len(record["exemplars"] or []) for record in answers.records])),
        prompt_tokens=float(np.mean([record["prompt_tokens"] or 0 for record in answers.records])),
    )


def _count_questions(records: Sequence[Record]) -> dict[str, Any]:
    """Number of questions, and of those that were truncated, dropped or not answered."""
    plain = [record for record in records if not record["perturbation"]]
    return {
        "questions": len(plain),
        "truncated": dict(Counter(record["truncated"] for record in plain if record["truncated"])),
        "dropped": dict(Counter(record["dropped"] for record in plain if record["dropped"])),
        "unscored": sum(bool(record["unscored"]) for record in records),
    }


def _perturbations(answers: AnswerStatistics, answered: Sequence[Record]) -> dict[str, PerturbationScore]:
    """Perturbation → scores of its questions, and of the same questions unperturbed."""
    shots = {record["shots"] for record in answers.records}
    plain = {question_key(record): record for record in answers.records}
    pairs_of_kind: dict[str, list[tuple[Record, Record]]] = defaultdict(list)
    for record in answered:
        if record["perturbation"] and record["shots"] in shots and question_key(record) in plain:
            pairs_of_kind[record["perturbation"]].append((record, plain[question_key(record)]))
    return {
        kind: PerturbationScore(
            questions=len(pairs),
            score=float(np.mean([perturbed["score"] for perturbed, _ in pairs])),
            unchanged_score=float(np.mean([unperturbed["score"] for _, unperturbed in pairs])),
            changed=agreement([record for pair in pairs for record in pair]).changed,
        )
        for kind, pairs in sorted(pairs_of_kind.items())
    }


def _labels(records: Sequence[Record]) -> list[LabelShares] | None:
    """Share of each choice among predictions and right answers; None unless all questions have as many choices."""
    sizes = {len(record["choices"]) for record in records}
    if len(sizes) != 1 or not max(sizes):
        return None
    predicted = Counter(label_of(record["prediction"], record["choices"]) for record in records)
    right = Counter(label_of(record["target"], record["choices"]) for record in records)
    total = len(records)
    return [
        LabelShares(choice=choice, said=100 * predicted[place] / total, right=100 * right[place] / total)
        for place, choice in enumerate(records[0]["choices"])
    ]
