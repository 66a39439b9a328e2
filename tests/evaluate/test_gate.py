"""Bounds that hold and bounds that do not."""

from __future__ import annotations

from typing import Any

import pytest

from apprentice.evaluate.gate import sentence
from apprentice.evaluate.predictions import scored, with_facts
from apprentice.evaluate.summary import summarise
from apprentice.recipe import Gate, Recipe
from tests.evaluate import tables


def verdict(recipe: Recipe, **bounds: Any) -> dict[str, Any]:
    facts = tables.facts(recipe)
    facts["settings"]["gate"] = Gate(**bounds).model_dump(mode="json")
    found = summarise(with_facts(scored(tables.predictions(), tables.TASKS), facts), resamples=200)["gate"]
    assert found is not None
    return dict(found)


def test_without_a_gate_there_is_no_verdict(recipe: Recipe) -> None:
    assert summarise(tables.table(recipe), resamples=20)["gate"] is None


@pytest.mark.parametrize(
    ("bounds", "passed", "found"),
    [
        ({"held_out": 0.0}, True, 0.0),
        ({"held_out": 2.0}, False, 0.0),
        ({"trained_on": 37.5}, True, 37.5),  # alpha +50, gamma +25
        ({"trained_on": 37.5, "certain": True}, False, None),
        ({"worst_wording": 25.0}, True, 25.0),
        ({"tasks": {"alpha_rank": 75.0}}, True, 75.0),
        ({"tasks": {"alpha_rank": 75.1}}, False, 75.0),
        ({"tasks": {"no_such_task": 1.0}}, False, None),
    ],
)
def test_bounds(recipe: Recipe, bounds: dict[str, Any], passed: bool, found: float | None) -> None:
    judged = verdict(recipe, **bounds)
    assert judged["passed"] is passed
    if found is not None:
        assert judged["checks"][0]["found"] == pytest.approx(found)


def test_the_failing_line_names_every_bound(recipe: Recipe) -> None:
    line = sentence(verdict(recipe, held_out=2.0, tasks={"alpha_rank": 80.0, "gamma_text": 10.0}))
    assert line == (
        "gate: tuned failed: held_out mean above base is +0.0, at least +2.0 is asked;"
        " score of alpha_rank is +75.0, at least +80.0 is asked"
    )
    assert sentence(verdict(recipe, held_out=0.0)) == "gate: tuned passed all 1 bounds"
