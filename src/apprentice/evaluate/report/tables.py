"""Tables of a report as headers and rows of text, the same for Markdown and HTML. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from apprentice.evaluate.report.report_schema import Column, Difference, GroupEntry, Report, TaskEntry, WinRate
from apprentice.evaluate.stats.metrics import METRICS


class TableCell(NamedTuple):
    """A table's cell: its text, and how the page marks it: `held_out`, `scored_only`, `better`, `worse`, or not at all."""

    text: str
    mark: str = ""


TAGS = {"held_out": "held out", "scored_only": "scored only"}
Table = tuple[list[str], list[list[TableCell]]]
STEADINESS = ("median", "worst", "spread", "changed", "consistency")  # of a cell, over the wordings


def task_table(report: Report) -> Table:
    """Header and rows: one line per task, held-out first, one column per subject, differences with their interval."""
    columns, compared = report.columns, report.compared_columns
    header = ["task", "metric", *_score_titles(report)]
    has_contamination = any(task.contaminated for task in report.tasks)
    if report.shared:
        header.insert(2, "rows of all")
    rows = []
    for task in report.tasks:
        scores = [_number(cell.score if (cell := task.columns.get(column.key)) else None) for column in columns]
        differences = [_difference(task.differences.get(column.key), _fewer_rows(task, column)) for column in compared]
        cells = [_label(task.task, task), TableCell(METRICS[task.metric].title), *scores, *differences]
        if report.shared:
            cells.insert(2, TableCell(str(report.shared[task.task].rows)))
        if has_contamination:
            seen = task.contaminated
            cells.append(TableCell("–" if seen is None else f"{seen.rows} of {seen.of}"))
        rows.append(cells)
    return [*header, "test rows seen in training data"] if has_contamination else header, rows


def pool_table(report: Report) -> Table:
    """Table of the pools: tasks of one exposure (held out, scored only, trained on) and kind (ranked, generated)."""
    labels = [
        TableCell(f"{pool.kind}, trained on") if pool.exposure == "trained_on" else _label(str(pool.kind), pool)
        for pool in report.pools
    ]
    return _group_table(report, "kind", report.pools, labels)


def cluster_table(report: Report) -> Table:
    """Table of the clusters of tasks, held-out ones first."""
    labels = [_label(str(cluster.cluster), cluster) for cluster in report.clusters]
    return _group_table(report, "cluster", report.clusters, labels)


def _group_table(report: Report, name: str, groups: Sequence[GroupEntry], labels: Sequence[TableCell]) -> Table:
    rows = []
    for group, label in zip(groups, labels, strict=True):
        means = []
        for column in report.columns:
            mean = group.columns.get(column.key)
            # A mean over fewer tasks than the line has cannot be compared with its neighbours unsaid.
            few = f" ({mean.tasks} tasks)" if mean and mean.tasks < group.tasks else ""
            means.append(TableCell(_number(mean.mean if mean else None).text + few))
        differences = [_difference(group.differences.get(column.key)) for column in report.compared_columns]
        rows.append([label, TableCell(str(group.tasks)), *means, *differences])
    return [name, "tasks", *_score_titles(report)], rows


def wording_table(report: Report) -> Table:
    """Over the wordings: median, worst, spread, rows that changed, consistency; a line per task, and per cluster of several.

    Of every subject the column with fewest exemplars, as in the plot; what no task has is left out.
    """
    columns = fewest_shots(report)
    cells = [cell for task in report.tasks for column in columns if (cell := task.columns.get(column.key))]
    names = [name for name in STEADINESS if any(getattr(cell, name) is not None for cell in cells)]
    lines: list[tuple[TaskEntry | GroupEntry, str, str]] = []
    for task in report.tasks:
        wordings = [cell.wordings or {} for column in columns if (cell := task.columns.get(column.key))]
        lines.append((task, task.task, str(max(map(len, wordings), default=0))))
    lines += [(cluster, f"all of {cluster.cluster}", "") for cluster in report.clusters if cluster.tasks > 1]
    rows = []
    for line, title, count in lines:
        numbers = [_number(getattr(line.columns.get(column.key), name, None)) for column in columns for name in names]
        rows.append([_label(title, line), TableCell(count), *numbers])
    return ["task", "wordings", *[f"{column.title} {name}" for column in columns for name in names]], rows


def fewest_shots(report: Report) -> list[Column]:
    """Columns with the fewest exemplars, without the baseline."""
    least = min(column.shots for column in report.columns[1:])
    return [column for column in report.columns[1:] if column.shots == least]


def perturbation_table(report: Report) -> Table:
    """For each kind of change: score of the changed questions (of the same unchanged), and the rows whose answer changed."""
    columns = report.columns[1:]
    rows = []
    for task in report.tasks:
        cells = [task.columns.get(column.key) for column in columns]
        scores = [(cell.perturbations if cell else None) or {} for cell in cells]
        for kind in sorted({kind for of_column in scores for kind in of_column}):
            texts = ["–"] * len(columns)
            for place, of_column in enumerate(scores):
                if score := of_column.get(kind):
                    texts[place] = f"{score.score:.1f} ({score.unchanged_score:.1f}), {score.changed or 0:.0f}%"
            rows.append([_label(task.task, task), TableCell(kind.replace("_", " ")), *map(TableCell, texts)])
    return ["task", "change", *[f"{column.title}: score (unchanged), rows changed" for column in columns]], rows


def judged_table(report: Report) -> Table:
    """Win rates, and beside them rewards, lengths and how much likelier the replies are to their writer than to the other model."""
    titles = report.titles
    rows = []
    for line in report.judged.lines if report.judged else []:
        low, high = line.interval
        rows.append(
            [
                _label(f"{titles[line.column]} against {titles[line.against]}", line),
                TableCell(str(line.questions)),
                TableCell(f"{line.win_rate:.1f} ({low:.1f} to {high:.1f})", _mark(line)),
                TableCell(" / ".join(f"{value:.2f}" for value in line.reward)),
                TableCell(" / ".join(f"{value:.1f}" for value in line.words)),
                TableCell("–" if line.log_ratio is None else f"{line.log_ratio:.3f}"),
            ]
        )
    return ["replies", "questions", "win rate", "mean reward of both", "words of both", "log-ratio per token"], rows


def to_markdown(header: Sequence[str], rows: Sequence[Sequence[TableCell]]) -> list[str]:
    """Lines of a Markdown table; all but the first column to the right."""
    texts = [[f"{cell.text} ({TAGS[cell.mark]})" if cell.mark in TAGS else cell.text for cell in row] for row in rows]
    lines = [f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |" for row in (header, *texts)]
    return [lines[0], "|---" + "|---:" * (len(header) - 1) + "|", *lines[1:]]


def _score_titles(report: Report) -> list[str]:
    """Titles of the columns and of their differences."""
    titles = report.titles
    return [*titles.values(), *[f"{column.title} − {titles[column.against or '']}" for column in report.compared_columns]]


def _number(value: float | None) -> TableCell:
    return TableCell("–" if value is None else f"{value:.1f}")


def _label(name: str, line: TaskEntry | GroupEntry | WinRate) -> TableCell:
    """First cell of a line: the name of its task or cluster, marked where it was not trained on."""
    return TableCell(name, line.exposure if line.exposure in TAGS else "")


def _mark(line: Difference | WinRate) -> str:
    return line.verdict if line.verdict != "unclear" else ""


def _fewer_rows(task: TaskEntry, column: Column) -> str:
    """Number of rows of a difference, where one of the two columns beside it has more."""
    difference = task.differences.get(column.key)
    if difference is None or all(task.columns[key].rows == difference.rows for key in (column.key, difference.against)):
        return ""
    return f" on {difference.rows} rows"


def _difference(difference: Difference | None, rows: str = "") -> TableCell:
    if difference is None:
        return TableCell("–")
    low, high = difference.interval
    p = f"p {difference.p:.3f}" if difference.p >= 0.001 else "p < 0.001"
    return TableCell(f"{difference.mean:+.1f} ({low:+.1f} to {high:+.1f}){rows}, {p}", _mark(difference))
