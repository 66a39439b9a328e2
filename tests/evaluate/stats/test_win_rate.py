"""Win rates worked out on paper, and replies put as choices."""

from __future__ import annotations

from typing import Any

import pytest
from scipy.stats import binomtest

from apprentice.data.corpus import Corpus
from apprentice.evaluate.report.compare import join_tables
from apprentice.evaluate.report.predictions import metadata_of, read, save
from apprentice.evaluate.report.report_schema import Column, Report
from apprentice.evaluate.report.tables import judged_table
from apprentice.evaluate.report.write import html, markdown
from apprentice.evaluate.scoring.judge import group_replies, judge_questions, likelihood_questions, request_of
from apprentice.evaluate.stats.summary import summarise
from apprentice.evaluate.stats.win_rate import compute_win_rates
from apprentice.recipe import Recipe
from apprentice.storage import Folder
from tests.evaluate import tables

COLUMNS = [
    Column(key=f"{name}@0", subject=name, shots=0, title=name, against=against)
    for name, against in (("base", None), ("tuned", "base@0"))
]


def win_rates(records: list[dict[str, Any]], exposure: str, resamples: int = 500) -> list[dict[str, Any]]:
    """Lines of the report."""
    rates = compute_win_rates("run:judge", records, COLUMNS, {"gamma_text": exposure}, resamples)
    assert rates.judge == "run:judge"
    lines: list[dict[str, Any]] = rates.model_dump(mode="json")["lines"]
    return lines


def said(subject: str, row: int, text: str, reward: float | None, *, ratio: float | None = None, **more: Any) -> dict[str, Any]:
    record = tables.record(subject, tables.TASKS[2], row, "w0", text, reward=reward, log_ratio=ratio, reply_tokens=4)
    return record | more


def test_a_win_a_tie_and_a_loss_make_half() -> None:
    records = [
        *(said("base", row, "two words", 1.0) for row in range(3)),
        *(said("tuned", row, "one two three", reward, ratio=2.0) for row, reward in enumerate((3.0, 1.0, -1.0))),
        said("tuned", 3, "nothing to meet", 5.0),
        said("majority", 0, "a", None),
    ]
    [line] = win_rates(records, "trained_on")
    assert (line["held_out"], line["column"], line["against"], line["questions"]) == (False, "tuned@0", "base@0", 3)
    assert (line["win_rate"], line["reward"], line["words"]) == (50.0, [1.0, 1.0], [3.0, 2.0])
    assert line["log_ratio"] == pytest.approx(0.5)
    assert 0.0 <= line["interval"][0] < 50.0 < line["interval"][1] <= 100.0


def test_the_wordings_of_a_row_are_one_case() -> None:
    """Two rows whose wordings all agree: the interval is that of one win in two, however many wordings there are."""
    records = [
        said(subject, row, "text", float(row if subject == "tuned" else 0.5), template=f"w{wording}")
        for subject in ("base", "tuned")
        for row in range(2)
        for wording in range(9)
    ]
    [line] = compute_win_rates("judge", records, COLUMNS, {"gamma_text": "held_out"}, resamples=500).model_dump(mode="json")[
        "lines"
    ]
    expected = binomtest(1, 2).proportion_ci(method="wilson")
    assert (line["win_rate"], line["log_ratio"], line["p"]) == (50.0, None, 1.0)
    assert line["interval"] == pytest.approx([100 * expected.low, 100 * expected.high])


def test_winning_always_is_not_certain_and_few_wins_are_no_mark() -> None:
    def line(rows: int) -> dict[str, Any]:
        records = [said(name, row, "text", reward) for row in range(rows) for name, reward in (("base", 0.0), ("tuned", 1.0))]
        [rate] = compute_win_rates("judge", records, COLUMNS, {"gamma_text": "held_out"}, resamples=2000).model_dump(mode="json")[
            "lines"
        ]
        return dict(rate)

    assert (line(20)["win_rate"], line(20)["interval"]) == (100.0, pytest.approx([83.9, 100.0], abs=0.05))
    assert line(20)["p"] < 0.01
    assert line(4)["p"] == pytest.approx(1 / 8, abs=0.03)


def judged(recipe: Recipe, judge: str = "run:judge") -> Any:
    settings = recipe.evaluation.model_copy(update={"judge": judge})
    records = [
        record | {"reward": float(len(record["prediction"]) + record["row"]), "log_ratio": 0.25, "reply_tokens": 1}
        if not record["choices"]
        else record
        for record in tables.predictions()
    ]
    return tables.table(recipe.model_copy(update={"evaluation": settings}), records)


def test_the_report_shows_it(recipe: Recipe) -> None:
    report = summarise(judged(recipe), resamples=200)
    Report.model_validate(report.as_json())
    _, [row] = judged_table(report)
    assert row[0].text == "tuned against base"
    assert row[1].text == "16"
    assert row[-1].text == "0.250"
    for page in (markdown(report), html(report)):
        assert "Judged by a reward model" in page
        assert "it is no estimate of their kl divergence" in page.lower()
        assert "how often run:judge gives a written reply the higher reward" in page
    plain = summarise(tables.table(recipe), resamples=200)
    assert "judged" not in plain.as_json()
    assert "Judged by" not in markdown(plain)


def test_tables_without_rewards_are_still_read(recipe: Recipe, tmp_path: Any) -> None:
    table = tables.table(recipe)
    save(table.drop_columns(["reward", "log_ratio", "reply_tokens"]), Folder.at(tmp_path))
    again = read(Folder.at(tmp_path))
    assert again.column_names == table.column_names
    assert metadata_of(again) == metadata_of(table)


def test_runs_of_one_judge_are_compared_and_others_are_not(recipe: Recipe) -> None:
    same = tables.report_of(join_tables({"a": judged(recipe), "b": judged(recipe)}), resamples=200)
    [line] = same["judged"]["lines"]
    assert (line["column"], line["win_rate"], line["log_ratio"]) == ("b@0", 50.0, None)
    assert "judged" not in tables.report_of(join_tables({"a": judged(recipe), "b": judged(recipe, "run:other")}), resamples=200)


def test_replies_become_choices(corpus: Corpus) -> None:
    layout = corpus.layout
    records = [
        tables.record("base", tables.TASKS[2], 1, "w0", "a red house"),
        tables.record("tuned", tables.TASKS[2], 1, "w0", ""),
        tables.record("tuned", tables.TASKS[2], 2, "w0", None),
        tables.record("tuned", tables.TASKS[0], 1, "w0", "yes"),
    ]
    replies = group_replies(records)
    assert {request.row: [record["subject"] for record in group] for request, group in replies.items()} == {1: ["base", "tuned"]}
    questions = [records[0] | {"choices": [], "prompt_ids": [1]}, records[2] | {"choices": [], "prompt_ids": [2]}]
    [(question, [first, second])] = judge_questions(questions, replies, layout)
    assert (first, second) == (records[0], records[1])
    assert question["choices"] == ["a red house", ""]
    ids = layout.tokenizer.encode("a red house")
    assert question["choice_ids"] == [[*ids, *layout.end_ids], [*layout.end_ids]]
    [(question, [only])] = likelihood_questions(questions, replies, "base", layout)
    assert (question["choice_ids"], only) == ([ids], records[0])
    assert likelihood_questions(questions, replies, "tuned", layout) == []  # it said nothing
    assert request_of(records[0]).row == 1
