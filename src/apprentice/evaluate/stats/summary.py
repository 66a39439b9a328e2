"""Summary of a table of predictions as a report: scores, intervals, wordings, differences, pools.

    column   a subject at one number of exemplars, such as `model@0`; the baseline `majority@0` is the first
    task     scores of each column, and differences of columns over the rows that both answered
    pool     means over the tasks of one exposure (held out, scored only, trained on) and kind (ranked, generated)

Pure: the same table gives the same report, without any model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from apprentice.evaluate.report.examples import best_and_worst_questions, sample_questions
from apprentice.evaluate.report.headline import write_headlines, write_summary
from apprentice.evaluate.report.predictions import metadata_of
from apprentice.evaluate.report.quality_gate import evaluate_gate
from apprentice.evaluate.report.report_schema import (
    Column,
    ColumnScores,
    Difference,
    GroupEntry,
    GroupMean,
    Ranking,
    Report,
    TaskEntry,
    UnscoredQuestion,
)
from apprentice.evaluate.scoring.majority_baseline import NAME as MAJORITY
from apprentice.evaluate.stats.bootstrap import CONFIDENCE, RESAMPLES, mean_interval
from apprentice.evaluate.stats.comparison import Comparison, adjust_comparisons, compare_columns, compare_groups
from apprentice.evaluate.stats.metrics import METRICS
from apprentice.evaluate.stats.task_scores import AnswerStatistics, score_column
from apprentice.evaluate.stats.win_rate import compute_win_rates
from apprentice.inference.choices.choice_ranking import RANKING_TITLES
from apprentice.tasks.exposure import EXPOSURES, exposure_in

Record = Mapping[str, Any]
VERSION = 2  # of report.json: 1 had no `exposure`, `p_adjusted` and `shared`, bootstrap intervals throughout, and `divergence`
POOLS = [(exposure, kind) for exposure in EXPOSURES for kind in ("ranked", "generated")]  # in the order of the report
LEAST_SHARED_ROWS = 20  # compared runs with fewer rows in common in a pool have no headline about it
# Keys of a table's metadata, and of one of its tasks, that a report has as they are; tables of earlier versions lack some.
_METADATA = ("name", "created", "seconds", "seed", "versions", "recipe", "settings", "subjects", "not_scored", "test_rows", "story")
_TASK_METADATA = ("cluster", "summary", "kind", "metrics", "held_out", "exposure", "majority", "contaminated")


@dataclass(frozen=True)
class _ScoredTask:
    """A task with its metadata, records by column, scores of each column, and comparisons of columns."""

    name: str
    metadata: Mapping[str, Any]
    records: Mapping[str, Sequence[Record]]
    scores: Mapping[str, ColumnScores]
    comparisons: Mapping[str, Comparison]


def summarise(table: pa.Table, *, resamples: int = RESAMPLES) -> Report:
    """Builds the report: the table's metadata, columns, tasks, pools, clusters, headlines, summary, quality gate.

    Scores are 0 to 100. The other subjects are compared with the first, at the same number of exemplars. Held-out tasks come first.
    Intervals, wordings and pools use the first metric of each task. `resamples` is the number of bootstrap draws and permutations.
    """
    metadata = metadata_of(table)
    columns = _columns(metadata["subjects"])
    by_task = _group_records(table.to_pylist())
    records = [record for by_column in by_task.values() for of_column in by_column.values() for record in of_column]
    scored = _score_tasks(by_task, metadata, columns, resamples)
    differences = adjust_comparisons([task.comparisons for task in scored])
    tasks = [_task_entry(task, of_task, columns) for task, of_task in zip(scored, differences, strict=True)]
    pools = _group_entries(scored, [("kind", exposure, kind) for exposure, kind in POOLS], columns)
    clusters = dict.fromkeys(("cluster", task.metadata["exposure"], task.metadata["cluster"]) for task in scored)
    shared = metadata.get("shared")
    large_pools = [pool for pool in pools if not shared or _least_rows(pool, tasks) >= LEAST_SHARED_ROWS]
    settings = metadata["settings"]
    rank_by = settings.get("rank_by", "sum")
    optional: dict[str, Any] = {"shared": shared} if "shared" in metadata else {}
    if settings.get("judge"):
        exposures = {name: exposure_in(about)["exposure"] for name, about in metadata["tasks"].items()}
        optional["judged"] = compute_win_rates(settings["judge"], records, columns, exposures, resamples)
    return Report(
        version=VERSION,
        **{name: metadata[name] for name in _METADATA if name in metadata},
        **optional,
        tasks=tasks,
        confidence=CONFIDENCE,
        resamples=resamples,
        ranking=Ranking(by=rank_by, meaning=RANKING_TITLES[rank_by]),
        signatures=_signatures(tasks),
        columns=columns,
        pools=pools,
        clusters=_group_entries(scored, list(clusters), columns),
        unscored=_unscored_questions(records),
        headline=write_headlines(large_pools, columns),
        summary=write_summary(tasks, large_pools, columns),
        gate=evaluate_gate(settings.get("gate"), columns, tasks),
    )


def _key(subject: str, shots: int) -> str:
    return f"{subject}@{shots}"


def _columns(subjects: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Columns in the order of the report: the majority baseline, then each subject at each number of exemplars."""
    first = subjects[0]
    columns = [Column(key=_key(MAJORITY, 0), subject=MAJORITY, shots=0, title="majority", against=None)]
    for subject in subjects:
        for shots in subject["shots"]:
            is_compared = subject is not first and shots in first["shots"]
            columns.append(
                Column(
                    key=_key(subject["name"], shots),
                    subject=subject["name"],
                    shots=shots,
                    title=subject["name"] + (f" {shots}-shot" if shots else ""),
                    against=_key(first["name"], shots) if is_compared else None,
                )
            )
    return columns


def _group_records(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """Task → column → its records."""
    by_task: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        by_task[record["task"]][_key(record["subject"], record["shots"])].append(record)
    return by_task


def _score_tasks(
    by_task: Mapping[str, Mapping[str, list[Record]]], metadata: Mapping[str, Any], columns: Sequence[Column], resamples: int
) -> list[_ScoredTask]:
    """Scores and comparisons of every task that has records, in the order of the report."""
    scored = []
    for name, by_column in by_task.items():
        about = metadata["tasks"][name] | exposure_in(metadata["tasks"][name])
        metrics, key = about["metrics"], f"{metadata['seed']} {name}"
        answers = {column: AnswerStatistics.of(of_column, metrics) for column, of_column in by_column.items()}
        scores = {
            column: score_column(answers[column], of_column, metrics, key, resamples) for column, of_column in by_column.items()
        }
        comparisons = compare_columns(answers, columns, metrics[0], key, resamples)
        scored.append(_ScoredTask(name, about, by_column, scores, comparisons))
    return sorted(scored, key=lambda task: (EXPOSURES.index(task.metadata["exposure"]), task.metadata["cluster"], task.name))


def _task_entry(task: _ScoredTask, differences: dict[str, Difference], columns: list[Column]) -> TaskEntry:
    return TaskEntry(
        task=task.name,
        **{name: task.metadata[name] for name in _TASK_METADATA if name in task.metadata},
        metric=task.metadata["metrics"][0],
        columns=dict(task.scores),
        differences=differences,
        samples=sample_questions(task.records, columns),
        extremes=best_and_worst_questions(task.records, columns),
    )


def _group_entries(
    tasks: Sequence[_ScoredTask], groups: Sequence[tuple[str, str, str]], columns: Sequence[Column]
) -> list[GroupEntry]:
    """Means and differences of the groups that have tasks; a group is (`kind` or `cluster`, exposure, value of the first)."""
    members = {
        group: [task for task in tasks if (task.metadata["exposure"], task.metadata[group[0]]) == group[1:]] for group in groups
    }
    members = {group: in_group for group, in_group in members.items() if in_group}
    differences = adjust_comparisons(
        [compare_groups([task.comparisons for task in in_group], columns) for in_group in members.values()]
    )
    return [
        GroupEntry.model_validate(
            {
                "held_out": exposure == "held_out",
                "exposure": exposure,
                field: value,
                "tasks": len(in_group),
                "columns": {
                    column.key: mean
                    for column in columns
                    if (mean := _group_mean([task.scores[column.key] for task in in_group if column.key in task.scores]))
                },
                "differences": of_group,
            }
        )
        for ((field, exposure, value), in_group), of_group in zip(members.items(), differences, strict=True)
    ]


def _group_mean(cells: Sequence[ColumnScores]) -> GroupMean | None:
    """Means over the tasks of a group in one column, all weighted the same; None if none of them has a score."""
    estimates = [(cell.score, *cell.interval) for cell in cells if cell.score is not None and cell.interval is not None]
    if not estimates:
        return None
    scored = [cell for cell in cells if cell.score is not None]
    return GroupMean(
        mean=float(np.mean([score for score, *_ in estimates])),
        interval=mean_interval(estimates),
        tasks=len(estimates),
        worst=_mean([cell.worst for cell in scored]),
        spread=_mean([cell.spread for cell in scored]),
        changed=_mean([cell.changed for cell in scored]),
        consistency=_mean([cell.consistency for cell in scored]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _least_rows(pool: GroupEntry, tasks: Sequence[TaskEntry]) -> int:
    """Fewest rows that a difference in `pool` is computed from; 0 without differences."""
    members = [task.differences for task in tasks if (task.exposure, task.kind) == (pool.exposure, pool.kind)]
    keys = [key for differences in members for key in differences]
    return min((sum(differences[key].rows or 0 for differences in members if key in differences) for key in keys), default=0)


def _signatures(tasks: Sequence[TaskEntry]) -> dict[str, str]:
    """Metric → the reference implementation's name of its settings, for the metrics that have one."""
    used = sorted({name for task in tasks for name in task.metrics})
    return {name: signature() for name in used if (signature := METRICS[name].signature) is not None}


def _unscored_questions(records: Sequence[Record]) -> list[UnscoredQuestion]:
    """Questions that were asked and have no answer, each with its reason."""
    fields = ("subject", "task", "row", "template", "shots", "perturbation")
    return [
        UnscoredQuestion(**{name: record[name] for name in fields}, reason=record["unscored"])
        for record in records
        if record["unscored"]
    ]
