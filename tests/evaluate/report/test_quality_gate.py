"""Bounds that hold and bounds that do not."""

from __future__ import annotations

from typing import Any

import pytest

from apprentice.evaluate.report.predictions import score_predictions, with_metadata
from apprentice.evaluate.report.quality_gate import verdict_sentence
from apprentice.evaluate.report.report_schema import GateVerdict
from apprentice.recipe import Gate, Recipe
from tests.evaluate import tables


def verdict(recipe: Recipe, **bounds: Any) -> dict[str, Any]:
    facts = tables.facts(recipe)
    facts["settings"]["gate"] = Gate(**bounds).model_dump(mode="json")
    report = tables.report_of(with_metadata(score_predictions(tables.predictions(), tables.TASKS), facts), resamples=200)["gate"]
    assert report is not None
    return dict(report)


def test_without_a_gate_there_is_no_verdict(recipe: Recipe) -> None:
    assert tables.report_of(tables.table(recipe), resamples=20)["gate"] is None


@pytest.mark.parametrize(
    ("bounds", "passed", "value"),
    [
        ({"held_out": 0.0}, True, 0.0),
        ({"held_out": 2.0}, False, 0.0),
        ({"trained_on": 37.5}, True, 37.5),  # alpha +50, gamma +25
        ({"trained_on": 37.5, "certain": True}, False, None),
        ({"worst_wording": 25.0}, True, 25.0),
        ({"worst_wording": 25.0, "certain": True}, False, None),
        ({"tasks": {"gamma_text": 100.0}}, True, 100.0),
        # Eight of eight right is not certain to be right always, though every resample of them is.
        ({"tasks": {"gamma_text": 100.0}, "certain": True}, False, None),
        ({"tasks": {"alpha_rank": 75.0}}, True, 75.0),
        ({"tasks": {"alpha_rank": 75.1}}, False, 75.0),
        ({"tasks": {"no_such_task": 1.0}}, False, None),
    ],
)
def test_bounds(recipe: Recipe, bounds: dict[str, Any], passed: bool, value: float | None) -> None:
    checked = verdict(recipe, **bounds)
    assert checked["passed"] is passed
    if value is not None:
        assert checked["checks"][0]["found"] == pytest.approx(value)


def test_certain_is_the_low_end_of_the_summarys_own_interval(recipe: Recipe) -> None:
    facts = tables.facts(recipe)
    facts["tasks"]["gamma_text"]["metrics"] = ["exact_match"]
    facts["settings"]["gate"] = Gate(trained_on=0.0, worst_wording=0.0, tasks={"alpha_rank": 0.0}, certain=True).model_dump(
        mode="json"
    )
    for about in facts["tasks"].values():
        about |= {"kind": "ranked", "exposure": "trained_on"}  # so that one pool holds what the bound is about
    report = tables.report_of(with_metadata(score_predictions(tables.predictions(), tables.TASKS), facts), resamples=200)
    [pool] = report["pools"]
    trained_on, worst, alone = report["gate"]["checks"]
    assert pool["tasks"] == 3
    assert trained_on["found"] == pool["differences"]["tuned@0"]["interval"][0]
    assert trained_on["name"] == "low end of trained_on mean above base"
    [alpha] = [task for task in report["tasks"] if task["task"] == "alpha_rank"]
    assert alone["found"] == alpha["columns"]["tuned@0"]["interval"][0]
    mean = sum(task["columns"]["tuned@0"]["worst"] - task["columns"]["base@0"]["worst"] for task in report["tasks"]) / 3
    assert worst["found"] < mean - 10


def test_a_task_that_is_only_scored_is_in_neither_bound(recipe: Recipe) -> None:
    facts = tables.facts(recipe)
    facts["tasks"]["beta_rank"] |= {"held_out": False, "exposure": "scored_only"}
    facts["settings"]["gate"] = Gate(held_out=0.0, trained_on=37.5).model_dump(mode="json")
    report = tables.report_of(with_metadata(score_predictions(tables.predictions(), tables.TASKS), facts), resamples=50)
    assert [(check["found"], check["passed"]) for check in report["gate"]["checks"]] == [(None, False), (37.5, True)]


def test_the_failing_line_names_every_bound(recipe: Recipe) -> None:
    failed, passed = verdict(recipe, held_out=2.0, tasks={"alpha_rank": 80.0, "gamma_text": 10.0}), verdict(recipe, held_out=0.0)
    line = verdict_sentence(GateVerdict.model_validate(failed))
    assert line == (
        "gate: tuned failed: held_out mean above base is +0.0, at least +2.0 is asked;"
        " score of alpha_rank is +75.0, at least +80.0 is asked"
    )
    assert verdict_sentence(GateVerdict.model_validate(passed)) == "gate: tuned passed all 1 bounds"
