"""Reports have the published shape, and the shape refuses what is none."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from apprentice.evaluate.report.predictions import score_predictions, with_metadata
from apprentice.evaluate.report.report_schema import Report
from apprentice.recipe import Gate, Recipe
from tests.evaluate import tables


def test_a_report_has_the_published_shape(recipe: Recipe) -> None:
    records = tables.predictions()
    records.append({**records[0], "perturbation": "case"})
    records.append({**records[1], "perturbation": "case", "prediction": None, "unscored": "no answer"})
    facts = tables.facts(recipe)
    facts["settings"]["gate"] = Gate(held_out=1.0).model_dump(mode="json")
    report = tables.report_of(with_metadata(score_predictions(records, tables.TASKS), facts), resamples=20)
    read = Report.model_validate_json(json.dumps(report))
    assert len(read.tasks) == 3
    assert read.unscored[0].reason == "no answer"
    assert read.gate is not None
    assert not read.gate.passed
    assert read.tasks[1].columns["base@0"].perturbations is not None
    with pytest.raises(ValidationError):
        Report.model_validate(report | {"surprise": 1})
    report["tasks"][0]["columns"]["base@0"]["score"] = "much"
    with pytest.raises(ValidationError):
        Report.model_validate(report)


def test_perturbed_questions_do_not_enter_scores(recipe: Recipe) -> None:
    records = tables.predictions()
    wrong = [{**record, "perturbation": "case", "prediction": "no"} for record in records if record["subject"] == "tuned"]
    plain, more = (tables.report_of(tables.table(recipe, kept), resamples=20) for kept in (records, records + wrong))
    for before, after in zip(plain["tasks"], more["tasks"], strict=True):
        for key, cell in before["columns"].items():
            assert (cell["score"], cell["questions"]) == (after["columns"][key]["score"], after["columns"][key]["questions"])
    changed = more["tasks"][1]["columns"]["tuned@0"]["perturbations"]["case"]
    assert (changed["score"], changed["unchanged_score"], changed["changed"]) == (0.0, 75.0, 75.0)
