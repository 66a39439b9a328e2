"""Runs side by side, question by question."""

from __future__ import annotations

from typing import Any

import pytest

from apprentice.errors import EvaluationError
from apprentice.evaluate.report.compare import join_tables
from apprentice.evaluate.report.predictions import metadata_of, score_predictions, with_metadata
from apprentice.evaluate.report.report_schema import Report
from apprentice.evaluate.report.tables import task_table
from apprentice.evaluate.report.write import html, markdown
from apprentice.evaluate.stats.summary import summarise
from apprentice.recipe import Recipe
from tests.evaluate import tables


def test_every_run_meets_the_first(recipe: Recipe) -> None:
    one = tables.table(recipe)
    other = tables.table(recipe, tables.predictions(tuned=(7, 4, 8)))
    report = tables.report_of(join_tables({"one": one, "other": other}), resamples=50)
    assert [(column["key"], column["against"]) for column in report["columns"]] == [
        ("majority@0", None),
        ("one@0", None),
        ("other@0", "one@0"),
    ]
    alpha = next(task for task in report["tasks"] if task["task"] == "alpha_rank")
    assert alpha["differences"]["other@0"]["mean"] == pytest.approx(100 / 8)


def of_rows(rows: range, right: int) -> list[dict[str, Any]]:
    """The last subject's answers to some rows of alpha, the first `right` of them right."""
    of = tables.TASKS[0]
    return [
        tables.record(subject, of, row, "w0", "no" if subject == "majority" or place >= right else "yes")
        for place, row in enumerate(rows)
        for subject in ("base", "tuned", "majority")
    ]


def test_columns_and_differences_are_over_the_same_rows(recipe: Recipe) -> None:
    """Each run has half of its own rows right, and of those that both have the second run has more."""
    one, other = of_rows(range(40), 20), of_rows(range(15, 45), 15)
    assert [sum(r["subject"] == "tuned" and r["prediction"] == "yes" for r in run) / (len(run) / 3) for run in (one, other)] == [
        0.5,
        0.5,
    ]
    compared = summarise(join_tables({"one": tables.table(recipe, one), "other": tables.table(recipe, other)}), resamples=50)
    report = compared.as_json()
    Report.model_validate(report)
    [alpha] = report["tasks"]
    cells = {key: (cell["score"], cell["rows"]) for key, cell in alpha["columns"].items()}
    assert cells == {"majority@0": (0.0, 25), "one@0": (20.0, 25), "other@0": (60.0, 25)}
    difference = alpha["differences"]["other@0"]
    assert (difference["mean"], difference["rows"]) == (pytest.approx(cells["other@0"][0] - cells["one@0"][0]), 25)
    assert report["shared"] == {"alpha_rank": {"rows": 25, "questions": 25, "of": {"one": 40, "other": 30}}}
    for page in (markdown(compared), html(compared)):
        assert "alpha_rank: all columns are over the 25 rows that every run answered (one 40, other 30)." in page
    header, [row] = task_table(compared)
    assert (header[2], row[2].text) == ("rows of all", "25")
    assert report["headline"]
    assert {line["task"]: line["reason"] for line in report["not_scored"]} == {
        "beta_rank": "no question that all runs answered",
        "gamma_text": "no question that all runs answered",
    }


def test_too_few_rows_in_common_are_no_headline(recipe: Recipe) -> None:
    runs = {"one": tables.table(recipe, of_rows(range(40), 20)), "other": tables.table(recipe, of_rows(range(37, 77), 20))}
    report = tables.report_of(join_tables(runs), resamples=50)
    assert report["tasks"][0]["differences"]["other@0"]["rows"] == 3
    assert report["headline"] == []
    assert report["summary"]["sentence"] == "other against one, points with 95% interval: too few rows to say"


def test_three_runs_share_what_all_of_them_answered(recipe: Recipe) -> None:
    runs = {f"run{first}": tables.table(recipe, of_rows(range(first, first + 30), 9)) for first in (0, 5, 10)}
    report = tables.report_of(join_tables(runs), resamples=50)
    assert {cell["rows"] for cell in report["tasks"][0]["columns"].values()} == {20}
    unanswered = of_rows(range(30), 9)
    for record in unanswered[:6]:
        record |= {"prediction": None, "unscored": "the endpoint was down"}
    runs["run0"] = tables.table(recipe, unanswered)
    assert tables.report_of(join_tables(runs), resamples=50)["shared"]["alpha_rank"]["rows"] == 20


def test_no_question_in_common(recipe: Recipe) -> None:
    with pytest.raises(EvaluationError, match="answered no question in common"):
        join_tables({name: tables.table(recipe, of_rows(rows, 3)) for name, rows in (("a", range(5)), ("b", range(5, 9)))})


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("held_out", "held_out", "held_out"),
        ("held_out", "scored_only", "scored_only"),
        ("scored_only", "trained_on", "trained_on"),
        (None, "trained_on", "trained_on"),  # of an earlier version, held out
    ],
)
def test_a_task_is_what_the_run_that_saw_most_of_it_makes_it(recipe: Recipe, one: str | None, other: str, both: str) -> None:
    runs = {}
    for name, exposure in (("one", one), ("other", other)):
        facts = tables.facts(recipe)
        facts["tasks"]["alpha_rank"] |= {"held_out": exposure in (None, "held_out"), "exposure": exposure}
        if exposure is None:
            del facts["tasks"]["alpha_rank"]["exposure"]
        runs[name] = with_metadata(score_predictions(of_rows(range(8), 4), tables.TASKS), facts)
    assert metadata_of(join_tables(runs))["tasks"]["alpha_rank"]["exposure"] == both


def test_runs_without_a_common_task_and_a_single_run(recipe: Recipe) -> None:
    one = tables.table(recipe)
    with pytest.raises(EvaluationError, match="at least two runs"):
        join_tables({"one": one})
    facts = tables.facts(recipe)
    facts["tasks"] = {"else": facts["tasks"]["alpha_rank"]}
    with pytest.raises(EvaluationError, match="no task in common"):
        join_tables({"one": one, "other": with_metadata(one, facts)})
