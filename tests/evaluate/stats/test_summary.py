"""The table of predictions becomes the numbers that paper and pencil give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from apprentice.errors import EvaluationError
from apprentice.evaluate.report import predictions
from apprentice.evaluate.report.write import html, markdown
from apprentice.evaluate.stats.summary import summarise
from apprentice.recipe import Recipe
from apprentice.storage import Folder
from tests.evaluate import tables


@pytest.fixture(scope="module")
def report(recipe: Recipe) -> dict[str, Any]:
    return tables.report_of(tables.table(recipe), resamples=400)


def test_columns_and_tasks_come_in_the_order_shown(report: dict[str, Any]) -> None:
    assert [(c["key"], c["title"], c["against"]) for c in report["columns"]] == [
        ("majority@0", "majority", None),
        ("base@0", "base", None),
        ("base@5", "base 5-shot", None),
        ("tuned@0", "tuned", "base@0"),
    ]
    assert [(task["task"], task["held_out"], task["kind"]) for task in report["tasks"]] == [
        ("beta_rank", True, "ranked"),
        ("alpha_rank", False, "ranked"),
        ("gamma_text", False, "generated"),
    ]


def test_scores_of_a_task(report: dict[str, Any]) -> None:
    beta, alpha, gamma = report["tasks"]
    assert {key: cell["score"] for key, cell in alpha["columns"].items()} == {
        "majority@0": 0.0,
        "base@0": 25.0,
        "base@5": 25.0,
        "tuned@0": 75.0,
    }
    assert set(beta["columns"]) == {"majority@0", "base@0", "tuned@0"}
    # "blue house" shares one of two words with "red house": F1 is 50, exact match 0; 4 of 8 rows are right.
    assert gamma["columns"]["base@0"]["metrics"] == {"token_f1": 75.0, "exact_match": 50.0}
    assert gamma["columns"]["tuned@0"]["score"] == 100.0
    assert (alpha["columns"]["base@0"]["rows"], alpha["columns"]["base@0"]["questions"]) == (8, 16)
    assert alpha["columns"]["base@5"]["exemplars"] == 3.0


def test_differences_have_paired_intervals(report: dict[str, Any]) -> None:
    beta, alpha, gamma = (task["differences"]["tuned@0"] for task in report["tasks"])
    assert (alpha["mean"], alpha["against"], alpha["rows"], alpha["verdict"]) == (50.0, "base@0", 8, "unclear")
    low, high = alpha["interval"]
    assert 0 < low < 50 < high < 100
    # The same rows are right, and eight rows do not say that they always are: Newcombe's interval for 4, 0, 0 and 4.
    assert (beta["mean"], beta["verdict"]) == (0.0, "unclear")
    assert beta["interval"] == pytest.approx([-20.1, 20.1], abs=0.05)
    assert gamma["mean"] == 25.0


def test_better_needs_interval_and_test(recipe: Recipe) -> None:
    """Four of four rows that changed did so in favour: chance does that once in eight times. Eight of eight: once in 128."""
    few, many = (
        tables.report_of(tables.table(recipe, tables.predictions(base=(8 - gained, 4, 4), tuned=(8, 4, 4))), resamples=400)
        for gained in (4, 8)
    )
    differences = [report["tasks"][1]["differences"]["tuned@0"] for report in (few, many)]
    assert [entry["verdict"] for entry in differences] == ["unclear", "better"]
    assert differences[0]["p"] == pytest.approx(1 / 8, abs=0.05)
    assert differences[1]["p"] == pytest.approx(1 / 128, abs=0.015)
    assert "task tuned is better than base: +100.0 points" in many["headline"][1]


def test_a_mark_among_many_needs_more_than_one_alone(recipe: Recipe) -> None:
    """Seven of eight rows gained, which chance does once in 14 … once in 64: enough alone, not beside nine without any gain."""
    metrics = tables.TASKS[0]
    for count, verdict in ((1, "better"), (10, "unclear")):
        tasks = [metrics.model_copy(update={"name": f"alpha_{number}"}) for number in range(count)]
        records = []
        for number, of in enumerate(tasks):
            for row in range(tables.ROWS):
                records.append(tables.record("base", of, row, "w0", "no"))
                records.append(tables.record("tuned", of, row, "w0", "yes" if row < (7 if not number else 1) else "no"))
        facts = tables.facts(recipe)
        facts["tasks"] = {of.name: facts["tasks"]["alpha_rank"] for of in tasks}
        report = tables.report_of(predictions.with_metadata(predictions.score_predictions(records, tasks), facts), resamples=2000)
        differences = {task["task"]: task["differences"]["tuned@0"] for task in report["tasks"]}
        first = differences["alpha_0"]
        assert first["p"] == pytest.approx(2 / 128, abs=0.01)
        assert first["p_adjusted"] == pytest.approx(first["p"] * count, rel=1e-6)
        assert first["verdict"] == verdict
        assert first["interval"][0] > 0


def test_tables_of_earlier_versions_are_still_summed_up(recipe: Recipe, report: dict[str, Any]) -> None:
    """Their facts know two kinds of tasks."""
    old = tables.facts(recipe) | {"version": 1}
    for about in old["tasks"].values():
        del about["exposure"]
    again = tables.report_of(
        predictions.with_metadata(predictions.score_predictions(tables.predictions(), tables.TASKS), old), resamples=400
    )
    assert again["version"] == report["version"] == 2
    assert again["tasks"] == report["tasks"]
    assert again["headline"] == report["headline"]


def test_three_kinds_of_tasks_are_kept_apart(recipe: Recipe) -> None:
    facts = tables.facts(recipe)
    facts["tasks"]["beta_rank"] |= {"held_out": False, "exposure": "scored_only"}
    report = summarise(
        predictions.with_metadata(predictions.score_predictions(tables.predictions(), tables.TASKS), facts), resamples=50
    )
    assert [(pool.exposure, pool.held_out, pool.kind) for pool in report.pools] == [
        ("scored_only", False, "ranked"),
        ("trained_on", False, "ranked"),
        ("trained_on", False, "generated"),
    ]
    assert report.headline[0].startswith("On 1 scored-only ranked task tuned is")
    text = markdown(report)
    assert "| beta_rank (scored only) |" in text
    assert "| ranked (scored only) | 1 |" in text
    assert "held out)" not in text
    assert '<span class="tag">scored only</span>' in html(report)


def test_pools_keep_kinds_apart(report: dict[str, Any]) -> None:
    assert [(pool["held_out"], pool["kind"], pool["tasks"]) for pool in report["pools"]] == [
        (True, "ranked", 1),
        (False, "ranked", 1),
        (False, "generated", 1),
    ]
    assert [pool["differences"]["tuned@0"]["mean"] for pool in report["pools"]] == [0.0, 50.0, 25.0]
    assert "majority@0" not in report["pools"][2]["columns"]
    assert report["pools"][1]["columns"]["base@5"] == {**report["pools"][1]["columns"]["base@0"]}


def test_a_pool_of_two_tasks_averages_them_with_a_narrower_interval(recipe: Recipe) -> None:
    both = tables.facts(recipe)
    both["tasks"]["beta_rank"] |= {"held_out": False, "exposure": "trained_on"}
    records = tables.predictions(base=(2, 4, 4), tuned=(6, 6, 8))
    report = tables.report_of(predictions.with_metadata(predictions.score_predictions(records, tables.TASKS), both), resamples=1000)
    pool = report["pools"][0]
    assert (pool["tasks"], pool["differences"]["tuned@0"]["mean"]) == (2, (50.0 + 25.0) / 2)
    widths = [np.ptp(entry["differences"]["tuned@0"]["interval"]) for entry in [*report["tasks"][:2], pool]]
    # Tasks are independent: the variance of the mean of two is a quarter of the sum of theirs.
    assert widths[2] == pytest.approx(np.hypot(widths[0], widths[1]) / 2, rel=0.05)
    assert pool["columns"]["base@5"]["tasks"] == 1


def test_wordings_show_the_worst_and_the_spread(recipe: Recipe) -> None:
    records = [
        record | {"prediction": "no"}
        if record["template"] == "w1" and record["row"] < 3 and record["subject"] == "tuned"
        else record
        for record in tables.predictions()
    ]
    cell = tables.report_of(tables.table(recipe, records), resamples=50)["tasks"][1]["columns"]["tuned@0"]
    assert {name: wording["score"] for name, wording in cell["wordings"].items()} == {"w0": 75.0, "w1": 37.5}
    assert (cell["worst_wording"], cell["worst"], cell["spread"], cell["score"]) == ("w1", 37.5, 18.75, 56.25)


def test_dropped_questions_are_counted_and_pairs_share_rows(recipe: Recipe) -> None:
    records = tables.predictions()
    for record in records:
        if record["subject"] == "tuned" and record["task"] == "alpha_rank":
            if record["row"] == 0:
                record |= {"dropped": "too_long", "prediction": None}
            elif record["row"] == 1:
                record["truncated"] = "truncated_input"
    alpha = tables.report_of(tables.table(recipe, records), resamples=50)["tasks"][1]
    assert alpha["columns"]["tuned@0"]["dropped"] == {"too_long": 2}
    assert alpha["columns"]["tuned@0"]["truncated"] == {"truncated_input": 2}
    assert alpha["differences"]["tuned@0"]["rows"] == 7
    # Rows 1 to 5 of rows 1 to 7 against row 1 of the same.
    assert alpha["differences"]["tuned@0"]["mean"] == pytest.approx(100 * (5 - 1) / 7)


def test_a_task_whose_questions_are_all_dropped_has_no_score(recipe: Recipe) -> None:
    records = [
        record | {"dropped": "too_long", "prediction": None} if record["task"] == "beta_rank" else record
        for record in tables.predictions()
    ]
    report = tables.report_of(tables.table(recipe, records), resamples=50)
    assert {cell["score"] for cell in report["tasks"][0]["columns"].values()} == {None}
    assert report["pools"][0]["columns"] == report["pools"][0]["differences"] == {}


def test_headline_and_summary(report: dict[str, Any]) -> None:
    assert report["headline"][0] == (
        "On 1 held-out ranked task tuned is not clearly different from base: +0.0 points (95% interval -20.1 to +20.1)."
    )
    assert report["headline"][1].startswith(
        "On 1 trained-on ranked task tuned is not clearly different from base: +50.0 points (95% interval +"
    )
    assert report["summary"]["score"] == pytest.approx((75.0 + 50.0 + 100.0) / 3)
    assert report["summary"]["sentence"].startswith("tuned against base, points with 95% interval: held-out ranked +0.0 (")


def test_one_subject_alone_is_only_scored(recipe: Recipe) -> None:
    records = [record for record in tables.predictions() if record["subject"] != "tuned"]
    alone = tables.facts(recipe)
    alone["subjects"] = alone["subjects"][:1]
    report = tables.report_of(predictions.with_metadata(predictions.score_predictions(records, tables.TASKS), alone), resamples=50)
    assert report["headline"] == []
    assert report["summary"]["sentence"] == "base: held-out ranked 50.0, trained-on ranked 25.0, trained-on generated 75.0"


def test_samples_show_what_everyone_said(report: dict[str, Any]) -> None:
    samples = report["tasks"][1]["samples"]
    assert [sample["row"] for sample in samples] == [0, 1]
    assert samples[0] == {
        "row": 0,
        "template": "w0",
        "prompt": "<prompt> alpha_rank 0 w0",
        "target": "yes",
        "replies": {"majority@0": "no", "base@0": "yes", "base@5": "yes", "tuned@0": "yes"},
    }


def test_the_saved_table_gives_the_same_report(recipe: Recipe, report: dict[str, Any], tmp_path: Any) -> None:
    predictions.save(tables.table(recipe), Folder.at(tmp_path))
    assert tables.report_of(predictions.read(Folder.at(tmp_path)), resamples=400) == report


def test_a_strange_table_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"choose a predictions\.parquet"):
        tables.report_of(pa.table({"a": [1]}))
