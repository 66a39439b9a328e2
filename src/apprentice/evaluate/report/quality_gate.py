"""Quality gate: checks the last subject of a report against the lower bounds of the recipe's `evaluation.gate`. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apprentice.evaluate.stats.bootstrap import independent_difference_interval, mean_interval

Report = Mapping[str, Any]
Task = Mapping[str, Any]
Estimate = tuple[float, float, float]  # value, and the ends of its interval


def judged(report: Report) -> dict[str, Any] | None:
    """Verdict of the gate: `passed`, and one entry of `checks` for every bound; None without a gate.

    It judges the last subject at its fewest exemplars, relative to the column that it is compared with. A bound fails if nothing
    was measured for it.
    """
    gate = report["settings"].get("gate")
    if gate is None:
        return None
    last = report["columns"][-1]["subject"]
    column = next(column for column in report["columns"] if column["subject"] == last)
    other = str(column["against"] or "nothing").partition("@")[0]
    bounds: list[tuple[str, list[Estimate], float]] = []
    for bound in ("held_out", "trained_on"):
        if gate[bound] is not None:
            members = [task for task in report["tasks"] if task["exposure"] == bound]
            bounds.append((f"{bound} mean above {other}", _gains(members, column), gate[bound]))
    if gate["worst_wording"] is not None:
        bounds.append((f"worst wording above {other}", _worst(report["tasks"], column), gate["worst_wording"]))
    for name, least in gate["tasks"].items():
        members = [task for task in report["tasks"] if task["task"] == name]
        bounds.append((f"score of {name}", _scores(members, column), least))
    checks = [_check(name, estimates, least, certain=gate["certain"]) for name, estimates, least in bounds]
    return {"subject": last, "passed": all(check["passed"] for check in checks), "checks": checks}


def sentence(verdict: Mapping[str, Any]) -> str:
    """Verdict in one sentence, with every bound that failed."""
    if verdict["passed"]:
        return f"gate: {verdict['subject']} passed all {len(verdict['checks'])} bounds"
    failed = [
        f"{check['name']} is {'not measured' if check['found'] is None else format(check['found'], '+.1f')}, at least"
        f" {check['needed']:+.1f} is asked"
        for check in verdict["checks"]
        if not check["passed"]
    ]
    return f"gate: {verdict['subject']} failed: {'; '.join(failed)}"


def _gains(tasks: Sequence[Task], column: Task) -> list[Estimate]:
    """Difference of the column in each task that has one."""
    found = [task["differences"][column["key"]] for task in tasks if column["key"] in task["differences"]]
    return [(entry["mean"], *entry["interval"]) for entry in found]


def _scores(tasks: Sequence[Task], column: Task) -> list[Estimate]:
    cells = [task["columns"].get(column["key"]) for task in tasks]
    return [(cell["score"], *cell["interval"]) for cell in cells if cell and cell["score"] is not None]


def _worst(tasks: Sequence[Task], column: Task) -> list[Estimate]:
    """Difference of the worst wordings in each task; they may be two wordings, so the scores are taken as independent."""
    found: list[Estimate] = []
    for task in tasks:
        ours, theirs = (task["columns"].get(key) for key in (column["key"], column["against"]))
        if ours and theirs and ours["score"] is not None and theirs["score"] is not None:
            sides = [(cell["worst"], *cell["worst_interval"]) for cell in (ours, theirs)]
            found.append((ours["worst"] - theirs["worst"], *independent_difference_interval(*sides)))
    return found


def _check(name: str, estimates: Sequence[Estimate], needed: float, *, certain: bool) -> dict[str, Any]:
    """Check of one bound on the mean over tasks or, if `certain`, on the low end of that mean's interval."""
    found = None
    if estimates:
        found = mean_interval(estimates)[0] if certain else float(np.mean([value for value, *_ in estimates]))
    name = f"low end of {name}" if certain else name
    return {"name": name, "found": found, "needed": needed, "passed": found is not None and found >= needed}
