"""How often each task is drawn: the mixture's strategy and the tasks' sizes to integer weights.

Integers make everything that follows exact, and the same on every machine. Knows nothing of which row comes when.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from math import gcd, lcm

from apprentice.data.rotation import MAX_TOTAL
from apprentice.errors import RecipeError, did_you_mean
from apprentice.recipe import Mixture

_ROOM = MAX_TOTAL // 2  # weights are scaled to this total where exact ones would be larger; rounding up has the other half


def shares(mixture: Mixture, sizes: Mapping[str, int]) -> dict[str, int]:
    """Task → integer weight, for the tasks that have rows (`sizes`: usable training rows of the tasks trained on).

    Exact where the weights' total stays below 2**30, and else rounded to that total, though never to 0. Raises `RecipeError`
    if nothing has rows, or if `weights` names other tasks than those.
    """
    rows = {task: size for task, size in sizes.items() if size > 0}
    if not rows:
        raise RecipeError("data: no task has rows to train on; check data.tasks, data.hold_out and data.validation.")
    if mixture.strategy == "weights":
        return _integers(_given(mixture.weights or {}, sizes, rows))
    if mixture.strategy == "equal":
        return dict.fromkeys(rows, 1)
    counted = {task: min(size, mixture.cap or size) for task, size in rows.items()}
    if mixture.strategy == "proportional":
        return _integers({task: Fraction(size) for task, size in counted.items()})
    # Decimal powers are rounded alike on every machine; those of the C library are not.
    power = 1 / Decimal(str(mixture.temperature))
    return _integers({task: Fraction(Decimal(size) ** power) for task, size in counted.items()})


def _given(weights: Mapping[str, float], sizes: Mapping[str, int], rows: Mapping[str, int]) -> dict[str, Fraction]:
    for task in weights:
        if task not in sizes:
            raise RecipeError(f"data.mixture.weights: {task!r} is not a task that is trained on.{did_you_mean(task, sizes)}")
        if task not in rows:
            raise RecipeError(f"data.mixture.weights: {task!r} has no rows to train on; leave it out.")
    if missing := [task for task in rows if task not in weights]:
        raise RecipeError(f"data.mixture.weights: {missing[0]!r} has no weight; give one to every task that is trained on.")
    return {task: Fraction(str(weights[task])) for task in rows}


def _integers(weights: Mapping[str, Fraction]) -> dict[str, int]:
    scale = lcm(*(weight.denominator for weight in weights.values()))
    exact = {task: int(weight * scale) for task, weight in weights.items()}
    shared = gcd(*exact.values())
    exact = {task: weight // shared for task, weight in exact.items()}
    total = sum(exact.values())
    if total <= _ROOM:
        return exact
    return {task: max(1, round(Fraction(weight * _ROOM, total))) for task, weight in exact.items()}
