"""The gate: whether the last subject reached what the recipe asks of it. Pure: a report's numbers in, a verdict out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Report = Mapping[str, Any]


def judged(report: Report) -> dict[str, Any] | None:
    """`passed`, and one entry of `checks` for every bound of the recipe's `evaluation.gate`; None without a gate.

    The last subject is judged, at its fewest exemplars, beside the one it is compared with. A bound that nothing was measured
    for does not hold.
    """
    gate = report["settings"].get("gate")
    if gate is None:
        return None
    last = report["columns"][-1]["subject"]
    column = next(column for column in report["columns"] if column["subject"] == last)
    certain = gate["certain"]
    checks = []
    for bound, held_out in (("held_out", True), ("trained_on", False)):
        if gate[bound] is not None:
            members = [task for task in report["tasks"] if task["held_out"] is held_out]
            checks.append(_check(f"{bound} mean above {_other(column)}", _gain(report, members, column, certain), gate[bound]))
    if gate["worst_wording"] is not None:
        checks.append(_check(f"worst wording above {_other(column)}", _worst(report["tasks"], column), gate["worst_wording"]))
    for name, least in gate["tasks"].items():
        cell = next((task["columns"].get(column["key"]) for task in report["tasks"] if task["task"] == name), None)
        found = cell and cell["score"]
        checks.append(_check(f"score of {name}", cell["interval"][0] if cell and found is not None and certain else found, least))
    return {"subject": last, "passed": all(check["passed"] for check in checks), "checks": checks}


def sentence(verdict: Mapping[str, Any]) -> str:
    """The verdict in one line, every bound that failed in it."""
    if verdict["passed"]:
        return f"gate: {verdict['subject']} passed all {len(verdict['checks'])} bounds"
    failed = [
        f"{check['name']} is {'not measured' if check['found'] is None else format(check['found'], '+.1f')}, at least"
        f" {check['needed']:+.1f} is asked"
        for check in verdict["checks"]
        if not check["passed"]
    ]
    return f"gate: {verdict['subject']} failed: {'; '.join(failed)}"


def _other(column: Mapping[str, Any]) -> str:
    return str(column["against"] or "nothing").partition("@")[0]


def _gain(report: Report, tasks: Sequence[Mapping[str, Any]], column: Mapping[str, Any], certain: bool) -> float | None:
    """Mean difference over tasks. `certain`: the low end of the interval of the mean, from those of the pools they make up."""
    compared = [task["differences"][column["key"]] for task in tasks if column["key"] in task["differences"]]
    if not compared:
        return None
    mean = float(np.mean([found["mean"] for found in compared]))
    if not certain:
        return mean
    # Tasks are independent: their intervals' lower halves add up as squares.
    halves = [found["mean"] - found["interval"][0] for found in compared]
    return mean - float(np.sqrt(np.sum(np.square(halves)))) / len(compared)


def _worst(tasks: Sequence[Mapping[str, Any]], column: Mapping[str, Any]) -> float | None:
    """Mean over tasks of how far the worst wording lies above the other's worst."""
    gains = []
    for task in tasks:
        ours, theirs = (task["columns"].get(key) for key in (column["key"], column["against"]))
        if ours and theirs and ours["score"] is not None and theirs["score"] is not None:
            gains.append(ours["worst"] - theirs["worst"])
    return float(np.mean(gains)) if gains else None


def _check(name: str, found: float | None, needed: float) -> dict[str, Any]:
    return {"name": name, "found": found, "needed": needed, "passed": found is not None and found >= needed}
