"""What a run's folder adds to a report."""

from __future__ import annotations

import json
from pathlib import Path

from apprentice.evaluate.report.report_schema import Contamination, Report
from apprentice.evaluate.report.run_history import MOST_POINTS, export_sentence, read_history, summarise_contamination
from apprentice.evaluate.report.tables import task_table
from apprentice.evaluate.report.write import html, markdown, remarks
from apprentice.evaluate.stats.summary import summarise
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder
from tests.evaluate import tables


def test_a_long_curve_is_thinned_and_validation_is_kept(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1.0, "tokens_per_s": 5.0} for step in range(1, 2001)]
    lines.append({"step": 2000, "validation_loss": 0.5})
    torn = '{"step": 2001, "lo'
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    (tmp_path / "ledger.json").write_text('{"tasks": {}}')
    story = read_history(Run(Folder.at(tmp_path)))
    assert len(story["history"]) == MOST_POINTS + 1
    assert story["history"][0] == {"step": 1, "loss": 1.0}
    assert story["history"][-1] == {"step": 2000, "validation_loss": 0.5}
    assert story["ledger"] == {"tasks": {}}
    assert story["export"] is None  # a run of an earlier version
    assert read_history(None) == {"history": [], "ledger": None, "export": None, "time": None}


EXPORT = {
    "version": 1,
    "step": 40,
    "rows": "validation",
    "examples": 8,
    "of": "log-probabilities",
    "dtype": "bfloat16",
    "count": 123,
    "mean": 0.0031,
    "largest": 0.021,
}


def test_the_report_says_how_true_the_exported_model_is(tmp_path: Path, recipe: Recipe) -> None:
    run = Run(Folder.at(tmp_path))
    run.export_file.write_json(EXPORT)
    report = summarise(tables.table(recipe), resamples=20)
    assert not any("exported model" in line for line in remarks(report))
    report.story = read_history(run)
    said = (
        "The exported model (bfloat16) was held against the trained weights in float32 on 8 validation rows: the log-probabilities"
        " of 123 tokens differ by 3.1e-03 nats in the mean and by 2.1e-02 nats at most."
    )
    assert said in remarks(report)
    assert f"- {said}" in markdown(report).splitlines()
    assert said in html(report)
    assert Report.model_validate(report.as_json()).story["export"] == EXPORT


def test_an_export_without_facts_says_nothing_and_rewards_have_no_unit() -> None:
    assert export_sentence(None) is None
    said = export_sentence(EXPORT | {"of": "rewards", "rows": "training", "count": 16})
    assert said is not None
    assert "on 8 training rows: the rewards of 16 answers differ by 3.1e-03 in the mean and by 2.1e-02 at most." in said


def test_contamination_stands_beside_the_score(recipe: Recipe) -> None:
    assert summarise_contamination({}) == {}
    dropped = {"test_rows": 40, "shared": 3, "share": 0.075, "training_rows_dropped": {"x": 2, "y": 2}}
    kept = {"test_rows": 20, "shared": 2, "share": 0.1, "training_rows_kept": {"x": 5}}
    summary = summarise_contamination({"alpha_rank": dropped, "beta_rank": kept})
    assert summary["alpha_rank"] == {"rows": 3, "of": 40, "dropped": 4, "kept": 0}
    report = summarise(tables.table(recipe), resamples=20)
    for task in report.tasks:
        task.contaminated = Contamination(**summary[task.task]) if task.task in summary else None
    header, rows = task_table(report)
    assert header[-1] == "test rows seen in training data"
    shown = {row[0].text: row[-1].text for row in rows}
    assert (shown["alpha_rank"], shown["beta_rank"]) == ("3 of 40", "2 of 20")
    lines = remarks(report)
    assert "alpha_rank: 3 of 40 test rows share a passage with training rows, which were dropped." in lines
    assert "beta_rank: 2 of 20 test rows share a passage with training rows, which were trained on all the same." in lines
