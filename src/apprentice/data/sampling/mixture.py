"""Mixture weights: turns the recipe's mixture strategy and the tasks' sizes into an integer weight for each task.

Integer weights make the sampling plan exact, and the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from math import gcd, lcm
from typing import NamedTuple

from apprentice.data.sampling.interleave import MAX_TOTAL
from apprentice.errors import RecipeError, did_you_mean
from apprentice.recipe import Group, Mixture

_ROOM = MAX_TOTAL // 2  # larger totals are scaled to this one; the other half leaves room for rounding up


class Size(NamedTuple):
    """The size of a task that is trained on, as the mixture needs it."""

    rows: int  # usable training rows
    cluster: str = ""
    target_tokens: float = 1.0  # mean of an example's answer


def shares(mixture: Mixture, sizes: Mapping[str, Size]) -> dict[str, int]:
    """Task → integer weight of its share of plan positions, for the tasks that have rows.

    Weights are exact where their total stays below 2**30; otherwise they are rounded to that total, but never to 0. With
    `by: target_tokens`, a task whose answers are half as long is drawn twice as often. Raises `RecipeError` if no task has rows, if
    `weights` or `groups` name a task that is not trained on or leave one out, or if a task is in two groups.
    """
    if not any(size.rows for size in sizes.values()):
        raise RecipeError("data: no task has rows to train on; check data.tasks, data.hold_out and data.validation.")
    task_shares = _group_shares(mixture, dict(sizes), sizes, "data.mixture")
    if mixture.by == "target_tokens":
        task_shares = {task: _divide_by_tokens(share, sizes[task].target_tokens) for task, share in task_shares.items()}
    return _integers({task: task_shares[task] for task in sizes if task in task_shares})


def epoch_rows(mixture: Mixture | Group, sizes: Mapping[str, Size], where: str = "data.mixture") -> dict[str, int]:
    """Task → its rows in one epoch: all of them, up to the cap of the mixture or of the innermost group that the task is in."""
    if mixture.groups is None:
        return {task: min(size.rows, mixture.cap or size.rows) for task, size in sizes.items()}
    members = {name: _members(group, sizes, sizes, f"{where}.groups.{name}") for name, group in mixture.groups.items()}
    parts = [epoch_rows(mixture.groups[name], tasks, f"{where}.groups.{name}") for name, tasks in members.items()]
    return {task: rows for part in parts for task, rows in part.items()}


def _group_shares(
    mixture: Mixture | Group, sizes: Mapping[str, Size], known: Mapping[str, Size], where: str
) -> dict[str, Fraction]:
    """Task → its share among the tasks of `sizes`; shares add up to 1, and tasks without rows have none."""
    if mixture.groups is None:
        weights = _weights(mixture, sizes, where)
        total = sum(weights.values())
        return {task: weight / total for task, weight in weights.items()}
    members = {name: _members(group, sizes, known, f"{where}.groups.{name}") for name, group in mixture.groups.items()}
    homes: dict[str, str] = {}
    for name, tasks in members.items():
        for task in tasks:
            if task in homes:
                raise RecipeError(f"{where}.groups: {task!r} is in both {homes[task]!r} and {name!r}; leave it in one of them.")
            homes[task] = name
    if missing := [task for task, size in sizes.items() if task not in homes and size.rows]:
        raise RecipeError(f"{where}.groups: {missing[0]!r} is in no group; put every task that is trained on into one.")
    filled = {name: tasks for name, tasks in members.items() if any(size.rows for size in tasks.values())}
    whole = sum((Fraction(str(mixture.groups[name].share)) for name in filled), Fraction(0))
    task_shares: dict[str, Fraction] = {}
    for name, tasks in filled.items():
        group = mixture.groups[name]
        part = Fraction(str(group.share)) / whole
        inner = _group_shares(group, tasks, known, f"{where}.groups.{name}")
        task_shares |= {task: part * share for task, share in inner.items()}
    return task_shares


def _members(group: Group, sizes: Mapping[str, Size], known: Mapping[str, Size], where: str) -> dict[str, Size]:
    """The tasks that a group, or the groups inside it, name directly or by their cluster."""
    if group.groups is not None:
        inner = [_members(one, sizes, known, f"{where}.groups.{name}") for name, one in group.groups.items()]
        return {task: size for tasks in inner for task, size in tasks.items()}
    members: dict[str, Size] = {}
    for entry in group.tasks or ():
        matching = {task: size for task, size in sizes.items() if entry in (task, size.cluster)}
        if not matching:
            names = [*known, *sorted({size.cluster for size in known.values() if size.cluster})]
            raise RecipeError(
                f"{where}.tasks: {entry!r} is neither a task that is trained on nor a cluster of such.{did_you_mean(entry, names)}"
            )
        members |= matching
    return members


def _weights(mixture: Mixture | Group, sizes: Mapping[str, Size], where: str) -> dict[str, Fraction]:
    rows = {task: size.rows for task, size in sizes.items() if size.rows > 0}
    if mixture.strategy == "weights":
        return _explicit_weights(mixture.weights or {}, sizes, rows, where)
    if mixture.strategy == "equal":
        return dict.fromkeys(rows, Fraction(1))
    counted = {task: min(size, mixture.cap or size) for task, size in rows.items()}
    if mixture.strategy == "proportional":
        return {task: Fraction(size) for task, size in counted.items()}
    # Decimal powers are rounded the same on every machine; those of the C library are not.
    power = 1 / Decimal(str(mixture.temperature))
    return {task: Fraction(Decimal(size) ** power) for task, size in counted.items()}


def _explicit_weights(
    weights: Mapping[str, float], sizes: Mapping[str, Size], rows: Mapping[str, int], where: str
) -> dict[str, Fraction]:
    for task in weights:
        if task not in sizes:
            raise RecipeError(f"{where}.weights: {task!r} is not a task that is trained on.{did_you_mean(task, sizes)}")
        if task not in rows:
            raise RecipeError(f"{where}.weights: {task!r} has no rows to train on; leave it out.")
    if missing := [task for task in rows if task not in weights]:
        raise RecipeError(f"{where}.weights: {missing[0]!r} has no weight; give one to every task that is trained on.")
    return {task: Fraction(str(weights[task])) for task in rows}


def _divide_by_tokens(share: Fraction, target_tokens: float) -> Fraction:
    """`share` divided by the mean target tokens, as a decimal: decimals have a small common denominator, exact quotients do not."""
    return Fraction(Decimal(share.numerator) / Decimal(share.denominator) / Decimal(str(max(target_tokens, 1e-3))))


def _integers(weights: Mapping[str, Fraction]) -> dict[str, int]:
    scale = lcm(*(weight.denominator for weight in weights.values()))
    exact = {task: int(weight * scale) for task, weight in weights.items()}
    shared = gcd(*exact.values())
    exact = {task: weight // shared for task, weight in exact.items()}
    total = sum(exact.values())
    if total <= _ROOM:
        return exact
    return {task: max(1, round(Fraction(weight * _ROOM, total))) for task, weight in exact.items()}
