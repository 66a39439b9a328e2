"""Quality gate: checks the last subject of a report against the lower bounds of the recipe's `evaluation.gate`. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apprentice.evaluate.report.report_schema import Column, ColumnScores, GateCheck, GateVerdict, TaskEntry, first_column_of
from apprentice.evaluate.stats.bootstrap import Estimate, independent_difference_interval, mean_interval


def evaluate_gate(gate: Mapping[str, Any] | None, columns: list[Column], tasks: Sequence[TaskEntry]) -> GateVerdict | None:
    """Verdict on the bounds of `gate` (a recipe's `evaluation.gate` as JSON), a check for each; None without a gate.

    It judges the last subject at its fewest exemplars, relative to the column that it is compared with. A bound fails if nothing
    was measured for it.
    """
    if gate is None:
        return None
    column = first_column_of(columns[-1].subject, columns)
    other = (column.against or "nothing").partition("@")[0]
    bounds: list[tuple[str, list[Estimate], float]] = []
    for exposure in ("held_out", "trained_on"):
        if gate[exposure] is not None:
            members = [task for task in tasks if task.exposure == exposure]
            bounds.append((f"{exposure} mean above {other}", _gains(members, column), gate[exposure]))
    if gate["worst_wording"] is not None:
        bounds.append((f"worst wording above {other}", _worst_wording_gains(tasks, column), gate["worst_wording"]))
    for name, needed in gate["tasks"].items():
        members = [task for task in tasks if task.task == name]
        bounds.append((f"score of {name}", _scores(members, column), needed))
    checks = [_check(name, estimates, needed, certain=gate["certain"]) for name, estimates, needed in bounds]
    return GateVerdict(subject=column.subject, passed=all(check.passed for check in checks), checks=checks)


def verdict_sentence(verdict: GateVerdict) -> str:
    """Verdict in one sentence, with every bound that failed."""
    if verdict.passed:
        return f"gate: {verdict.subject} passed all {len(verdict.checks)} bounds"
    failures = [
        f"{check.name} is {'not measured' if check.found is None else format(check.found, '+.1f')}, at least"
        f" {check.needed:+.1f} is asked"
        for check in verdict.checks
        if not check.passed
    ]
    return f"gate: {verdict.subject} failed: {'; '.join(failures)}"


def _gains(tasks: Sequence[TaskEntry], column: Column) -> list[Estimate]:
    """Difference of the column in each task that has one."""
    differences = [task.differences[column.key] for task in tasks if column.key in task.differences]
    return [(difference.mean, *difference.interval) for difference in differences]


def _scores(tasks: Sequence[TaskEntry], column: Column) -> list[Estimate]:
    cells = [task.columns.get(column.key) for task in tasks]
    return [(cell.score, *cell.interval) for cell in cells if cell and cell.score is not None and cell.interval is not None]


def _worst_wording_gains(tasks: Sequence[TaskEntry], column: Column) -> list[Estimate]:
    """Difference of the worst wordings in each task; they may be two wordings, so the scores are taken as independent."""
    gains: list[Estimate] = []
    for task in tasks:
        ours = _worst_wording(task.columns.get(column.key))
        theirs = _worst_wording(task.columns.get(column.against or ""))
        if ours and theirs:
            gains.append((ours[0] - theirs[0], *independent_difference_interval(ours, theirs)))
    return gains


def _worst_wording(cell: ColumnScores | None) -> Estimate | None:
    return (cell.worst, *cell.worst_interval) if cell and cell.worst is not None and cell.worst_interval is not None else None


def _check(name: str, estimates: Sequence[Estimate], needed: float, *, certain: bool) -> GateCheck:
    """Check of one bound on the mean over tasks or, if `certain`, on the low end of that mean's interval."""
    value = None
    if estimates:
        value = mean_interval(estimates)[0] if certain else float(np.mean([mean for mean, *_ in estimates]))
    name = f"low end of {name}" if certain else name
    return GateCheck(name=name, found=value, needed=needed, passed=value is not None and value >= needed)
