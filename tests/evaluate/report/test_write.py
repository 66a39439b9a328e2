"""The report's files say what the numbers say."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from apprentice.evaluate.report.report_schema import Report
from apprentice.evaluate.report.tables import TableCell, task_table, wording_table
from apprentice.evaluate.report.write import html, markdown, remarks, write_report
from apprentice.evaluate.stats.summary import summarise
from apprentice.recipe import Recipe
from apprentice.storage import Folder
from tests.evaluate import tables

HISTORY: list[dict[str, Any]] = [
    {"step": 1, "loss": 2.5},
    {"step": 2, "loss": 2.0},
    {"step": 2, "loss": 2.1},  # made again after a restart
    {"step": 2, "validation_loss": 2.2},
]
LEDGER = {
    "tasks": {
        "alpha_rank": {"requested_share": 0.6, "share_of_examples": 0.6, "share_of_target_tokens": 0.2},
        "gamma_text": {"requested_share": 0.4, "share_of_examples": 0.4, "share_of_target_tokens": 0.8},
    }
}


@pytest.fixture(scope="module")
def report(recipe: Recipe) -> Report:
    return summarise(tables.table(recipe), resamples=400)


def test_the_table_has_held_out_tasks_first(report: Report) -> None:
    header, rows = task_table(report)
    assert header == ["task", "metric", "majority", "base", "base 5-shot", "tuned", "tuned − base"]
    assert rows[0][0] == TableCell("beta_rank", "held_out")
    assert [[cell.text for cell in row[:6]] for row in rows] == [
        ["beta_rank", "accuracy", "0.0", "50.0", "–", "50.0"],
        ["alpha_rank", "accuracy", "0.0", "25.0", "25.0", "75.0"],
        ["gamma_text", "token F1", "–", "75.0", "–", "100.0"],
    ]
    assert rows[0][6] == TableCell("+0.0 (-20.1 to +20.1), p 1.000")
    assert rows[1][6].mark == ""  # eight rows say too little
    assert re.fullmatch(r"\+50\.0 \(\+[\d.]+ to \+[\d.]+\), p 0\.\d+", rows[1][6].text)


def test_a_difference_over_fewer_rows_than_its_columns_says_so(recipe: Recipe) -> None:
    records = tables.predictions()
    for record in records:
        if (record["subject"], record["task"]) == ("tuned", "alpha_rank") and record["row"] < 3:
            record |= {"dropped": "too_long", "prediction": None}
    _, rows = task_table(summarise(tables.table(recipe, records), resamples=50))
    assert rows[1][0].text == "alpha_rank"
    assert ") on 5 rows, p" in rows[1][6].text
    assert "rows" not in rows[0][6].text


def test_markdown_is_a_table_that_github_reads(report: Report) -> None:
    text = markdown(report)
    lines = text.splitlines()
    assert lines[0] == "## Evaluation of small"
    top = lines.index("| task | metric | majority | base | base 5-shot | tuned | tuned − base |")
    widths = {line.count("|") for line in lines[top : top + 5]}
    assert widths == {8}
    assert "- delta: no test split." in lines
    assert "- base 5-shot: on average fewer exemplars fitted into the prompt: alpha_rank 3.0." in lines
    assert "| ranked (held out) | 1 | 0.0 | 50.0 | – | 50.0 | +0.0 (-20.1 to +20.1), p 1.000 |" in lines
    assert "| beta (held out) | 1 | 0.0 | 50.0 | – | 50.0 | +0.0 (-20.1 to +20.1), p 1.000 |" in lines
    names = ["median", "worst", "spread", "changed", "consistency"]
    columns = " | ".join(f"{subject} {name}" for subject in ("base", "tuned") for name in names)
    assert f"| task | wordings | {columns} |" in lines
    assert "| alpha_rank | 2 | 25.0 | 25.0 | 0.0 | 0.0 | 100.0 | 75.0 | 75.0 | 0.0 | 0.0 | 100.0 |" in lines
    assert not any(line.startswith("| all of") for line in lines)  # every cluster has one task


def test_what_no_task_has_is_no_column(report: Report) -> None:
    once = report.model_copy(deep=True)
    for task in once.tasks:
        for cell in task.columns.values():
            cell.changed = cell.consistency = None
    assert wording_table(once)[0][2:] == [f"{name} {what}" for name in ("base", "tuned") for what in ("median", "worst", "spread")]


def test_what_was_cut_is_said(recipe: Recipe) -> None:
    records = tables.predictions()
    for record in records[:6]:
        record["truncated"] = "truncated_input"
    for record in records[-4:]:
        record |= {"dropped": "too_long", "prediction": None}
    lines = remarks(summarise(tables.table(recipe, records), resamples=10))
    assert lines[0] == "base: 2 of 48 prompts were cut to fit (alpha_rank 2)."
    assert lines[1] == "base: 2 of 48 questions could not be asked (gamma_text 2)."


class Page(HTMLParser):
    """What a page loads from elsewhere, and its tags' balance."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")]


def test_html_needs_nothing_else(report: Report) -> None:
    text = html(report.model_copy(update={"story": {"history": HISTORY, "ledger": LEDGER}}))
    page = Page()
    page.feed(text)
    assert page.links == []
    assert re.findall(r"url\((?!['\"]?#)", text) == []
    assert page.tags["svg"] == 4  # wordings, exemplars, training, mixture
    assert page.tags["table"] == 4
    assert page.tags["details"] == len(report.tasks) + 2 * 10 + 1  # best, worst, and the recipe
    assert "&lt;prompt&gt; alpha_rank 0 w0" in text  # what a model saw or said is text, never markup
    assert "<prompt>" not in text


def test_pictures_are_whole_and_show_one_dot_per_wording(report: Report) -> None:
    text = html(report)
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 2
    for picture in pictures:
        ET.fromstring(picture)
    for title in ("base", "tuned", "majority answer", "beta_rank  (held out)"):
        assert f">{title}<" in pictures[0]


def test_the_files_are_written_and_the_same_again(report: Report, tmp_path: Path) -> None:
    for name in "ab":
        write_report(report, Folder.at(tmp_path / name))
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["report.html", "report.json", "report.md"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "report.json").read_text()) == report.as_json()
