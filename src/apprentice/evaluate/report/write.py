"""The report's numbers as files: report.json for programs, report.md for a pull request, report.html for reading.

The same numbers give the same files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import jinja2
import yaml

from apprentice.evaluate.report.examples import chosen
from apprentice.evaluate.report.plots import mixture_bars, shot_curves, training_curve, wording_dots
from apprentice.evaluate.report.quality_gate import sentence as verdict
from apprentice.evaluate.report.run_history import export_sentence
from apprentice.evaluate.stats.metrics import METRICS
from apprentice.storage import Folder

NOTES = (
    "Scores are 0 to 100 by the task's first metric: the mean over rows and their wordings (BLEU: of the whole corpus).",
    "Held out: the task's cluster is nowhere trained on. Scored only: other tasks of its cluster are trained on.",
    "Intervals are 95% over rows, the wordings of a row together: Wilson's where an answer is right or wrong, Newcombe's for"
    " differences of such scores, else the percentile bootstrap. Pools and clusters count every task the same, and the intervals of"
    " their tasks add up as squares.",
    "p is of the paired randomisation test. Better and worse are marked where the interval leaves 0 out and p, after Benjamini and"
    " Hochberg's correction for the number of comparisons in the same table, is at most 0.05.",
    "Worst wording and spread (distance between the quartiles of the wordings' scores) hold sampling noise besides the effect"
    " of wording where each wording met only a part of the rows. Changed: rows (%) that got more than one answer over their"
    " wordings. Consistency: how often (%) two askings of the same row, changed ones included, got the same answer.",
    "The majority answer is the most frequent one in training; generated tasks without a frequent answer have none.",
    "Exemplars come from the task's training rows, for held-out tasks too, and are the same for every model.",
)
JUDGED = (
    "Win rate: how often {} gives a written reply the higher reward, a tie counting half. Longer replies, and replies that the"
    " other model would hardly say, are ways to please a reward model without being better. The log-ratio is how much likelier its"
    " own greedy reply, tokenised again, is to the model than to the other, in nats per token. It is no estimate of their KL"
    " divergence, which needs sampled replies."
)


def write_report(report: Mapping[str, Any], out: Folder) -> None:
    """Writes report.json, report.md and report.html."""
    (out / "report.json").write_json(report)
    (out / "report.md").write_text(markdown(report))
    (out / "report.html").write_text(html(report))


def markdown(report: Mapping[str, Any]) -> str:
    """The report as GitHub Markdown."""
    lines = [
        f"## Evaluation of {report['name']}",
        "",
        *[f"- {sentence}" for sentence in report["headline"] or [report["summary"]["sentence"]]],
        *([f"- {verdict(report['gate'])}"] if report["gate"] else []),
        "",
    ]
    lines += _rows(*task_table(report))
    lines += [
        "",
        "### By kind of task",
        "",
        *_rows(*pool_table(report)),
        "",
        "### By cluster",
        "",
        *_rows(*cluster_table(report)),
        "",
        "### Wordings",
        "",
        *_rows(*wording_table(report)),
        "",
    ]
    if report.get("judged"):
        lines += ["### Judged by a reward model", "", *_rows(*judged_table(report)), ""]
    lines += [f"- {remark}" for remark in remarks(report)]
    lines += ["", *[f"<sub>{note}</sub><br>" for note in notes(report)], "", f"<sub>{settings(report)}</sub>", ""]
    return "\n".join(lines)


def html(report: Mapping[str, Any]) -> str:
    """The report as one page that needs nothing else."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["typeset"] = _typeset
    template = environment.from_string((files("apprentice.evaluate.report") / "report.html.jinja").read_text(encoding="utf-8"))
    tables = [("By cluster", *cluster_table(report)), ("By kind of task", *pool_table(report)), ("Tasks", *task_table(report))]
    details = [("Wordings in numbers", *wording_table(report))]
    if report.get("judged"):
        tables.append(("Judged by a reward model", *judged_table(report)))
    if any(cell.get("perturbations") for task in report["tasks"] for cell in task["columns"].values()):
        details.append(("Wordings changed on purpose", *perturbation_table(report)))
    return template.render(
        report=report,
        gate=verdict(report["gate"]) if report["gate"] else None,
        titles={column["key"]: column["title"] for column in report["columns"]},
        tags=TAGS,
        tables=tables,
        details=details,
        pictures=_pictures(report),
        extremes=[("The ten best", chosen(report["tasks"], "best")), ("The ten worst", chosen(report["tasks"], "worst"))],
        remarks=remarks(report),
        notes=notes(report),
        settings=settings(report),
        recipe=yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True),
    )


def _typeset(text: str) -> str:
    """The text with real minus signs before numbers."""
    return re.sub(r"(?<!\w)-(?=\d)", "−", text)


def _pictures(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Title, drawing and caption of each picture there is something for."""
    history, ledger = report["story"]["history"], report["story"]["ledger"]
    pictures = [("Every wording", wording_dots(report), "One dot per wording, a bar at the mean, dotted: the majority answer.")]
    if len({column["shots"] for column in report["columns"][1:]}) > 1:
        pictures.append(("With exemplars", shot_curves(report), "Mean over tasks by the number of exemplars, with 95% intervals."))
    if any(record.get("loss") is not None for record in history):
        pictures.append(("Training", training_curve(history), "Loss per optimizer step, pale; dark: its running mean."))
    if ledger and ledger.get("tasks"):
        caption = " ".join(["What each task was meant to have, and what it got.", *ledger.get("warnings", [])])
        pictures.append(("Mixture", mixture_bars(ledger), caption))
    return pictures


class TableCell(NamedTuple):
    """A table's cell: its text, and how the page marks it: `held_out`, `scored_only`, `better`, `worse`, or not at all."""

    text: str
    mark: str = ""


TAGS = {"held_out": "held out", "scored_only": "scored only"}
Table = tuple[list[str], list[list[TableCell]]]
STEADINESS = ("median", "worst", "spread", "changed", "consistency")  # of a cell, over the wordings


def task_table(report: Mapping[str, Any]) -> Table:
    """Header and rows: one line per task, held-out first, one column per subject, differences with their interval."""
    columns, compared = report["columns"], [column for column in report["columns"] if column["against"]]
    header = [
        "task",
        "metric",
        *[column["title"] for column in columns],
        *[_difference_title(report, column) for column in compared],
    ]
    looked = any(task.get("contaminated") for task in report["tasks"])
    if shared := report.get("shared"):
        header.insert(2, "rows of all")
    rows = []
    for task in report["tasks"]:
        name = _named(task["task"], task)
        scores = [_number(task["columns"].get(column["key"], {}).get("score")) for column in columns]
        differences = [_difference(task["differences"].get(column["key"]), _rows_fewer(task, column)) for column in compared]
        cells = [name, TableCell(METRICS[task["metric"]].title), *scores, *differences]
        if shared:
            cells.insert(2, TableCell(str(shared[task["task"]]["rows"])))
        if looked:
            seen = task.get("contaminated")
            cells.append(TableCell("–" if seen is None else f"{seen['rows']} of {seen['of']}"))
        rows.append(cells)
    return [*header, "test rows seen in training data"] if looked else header, rows


def pool_table(report: Mapping[str, Any]) -> Table:
    """Table of the pools: tasks of one exposure (held out, scored only, trained on) and kind (ranked, generated)."""
    return _group_table(report, "kind", report["pools"])


def cluster_table(report: Mapping[str, Any]) -> Table:
    """Table of the clusters of tasks, held-out ones first."""
    return _group_table(report, "cluster", report["clusters"])


def _group_table(report: Mapping[str, Any], name: str, groups: Sequence[Mapping[str, Any]]) -> Table:
    columns, compared = report["columns"], [column for column in report["columns"] if column["against"]]
    header = [
        name,
        "tasks",
        *[column["title"] for column in columns],
        *[_difference_title(report, column) for column in compared],
    ]
    rows = []
    for pool in groups:
        cells = []
        for column in columns:
            found = pool["columns"].get(column["key"])
            # A mean over fewer tasks than the line has cannot be compared with its neighbours unsaid.
            few = f" ({found['tasks']} tasks)" if found and found["tasks"] < pool["tasks"] else ""
            cells.append(TableCell(_number(found and found["mean"]).text + few))
        differences = [_difference(pool["differences"].get(column["key"])) for column in compared]
        trained = name == "kind" and pool["exposure"] == "trained_on"
        rows.append(
            [
                TableCell(f"{pool[name]}, trained on") if trained else _named(pool[name], pool),
                TableCell(str(pool["tasks"])),
                *cells,
                *differences,
            ]
        )
    return header, rows


def wording_table(report: Mapping[str, Any]) -> Table:
    """Over the wordings: median, worst, spread, rows that changed, consistency; a line per task, and per cluster of several.

    Of every subject the column with fewest exemplars, as in the picture; what no task has is left out.
    """
    least = min(column["shots"] for column in report["columns"][1:])
    lanes = [column for column in report["columns"][1:] if column["shots"] == least]
    cells = {column["key"]: [task["columns"].get(column["key"], {}) for task in report["tasks"]] for column in lanes}
    names = [name for name in STEADINESS if any(cell.get(name) is not None for found in cells.values() for cell in found)]
    lines: list[tuple[Mapping[str, Any], str, str]] = []
    for task in report["tasks"]:
        count = max(len(task["columns"].get(column["key"], {}).get("wordings", {})) for column in lanes)
        lines.append((task, task["task"], str(count)))
    lines += [(cluster, f"all of {cluster['cluster']}", "") for cluster in report["clusters"] if cluster["tasks"] > 1]
    rows = []
    for line, title, wordings in lines:
        found = [line["columns"].get(column["key"]) or {} for column in lanes]
        numbers = [_number(cell.get(name)) for cell in found for name in names]
        rows.append([_named(title, line), TableCell(wordings), *numbers])
    return ["task", "wordings", *[f"{column['title']} {name}" for column in lanes for name in names]], rows


def perturbation_table(report: Mapping[str, Any]) -> Table:
    """For each kind of change: score of the changed questions (of the same unchanged), and the rows whose answer changed."""
    columns = report["columns"][1:]
    rows = []
    for task in report["tasks"]:
        found = {column["key"]: task["columns"].get(column["key"], {}).get("perturbations", {}) for column in columns}
        for kind in sorted({kind for kinds in found.values() for kind in kinds}):
            cells = []
            for column in columns:
                cell = found[column["key"]].get(kind)
                changed = (
                    "–" if cell is None else f"{cell['score']:.1f} ({cell['unchanged_score']:.1f}), {cell['changed'] or 0:.0f}%"
                )
                cells.append(TableCell(changed))
            rows.append([_named(task["task"], task), TableCell(kind.replace("_", " ")), *cells])
    return ["task", "change", *[f"{column['title']}: score (unchanged), rows changed" for column in columns]], rows


def judged_table(report: Mapping[str, Any]) -> Table:
    """Win rates, and beside them rewards, lengths and how much likelier the replies are to their writer than to the other model."""
    titles = {column["key"]: column["title"] for column in report["columns"]}
    rows = []
    for line in report["judged"]["lines"]:
        low, high = line["interval"]
        mark = line["verdict"] if line["verdict"] != "unclear" else ""
        rows.append(
            [
                _named(f"{titles[line['column']]} against {titles[line['against']]}", line),
                TableCell(str(line["questions"])),
                TableCell(f"{line['win_rate']:.1f} ({low:.1f} to {high:.1f})", mark),
                TableCell(" / ".join(f"{value:.2f}" for value in line["reward"])),
                TableCell(" / ".join(f"{value:.1f}" for value in line["words"])),
                TableCell("–" if line["log_ratio"] is None else f"{line['log_ratio']:.3f}"),
            ]
        )
    return ["replies", "questions", "win rate", "mean reward of both", "words of both", "log-ratio per token"], rows


def remarks(report: Mapping[str, Any]) -> list[str]:
    """Remarks below the scores: cut and dropped questions, the export's difference, tasks that were not scored."""
    found = []
    for column in report["columns"][1:]:
        cells = [(task["task"], task["columns"][column["key"]]) for task in report["tasks"] if column["key"] in task["columns"]]
        total = sum(cell["questions"] for _, cell in cells)
        for what, key in (("prompts were cut to fit", "truncated"), ("questions could not be asked", "dropped")):
            counts = {name: sum(cell[key].values()) for name, cell in cells if cell[key]}
            if counts:
                where = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
                found.append(f"{column['title']}: {sum(counts.values())} of {total} {what} ({where}).")
        if column["shots"]:
            fitted = [(name, cell["exemplars"]) for name, cell in cells if cell["score"] is not None]
            few = [f"{name} {count:.1f}" for name, count in fitted if count < column["shots"] - 0.05]
            if few:
                found.append(f"{column['title']}: on average fewer exemplars fitted into the prompt: {', '.join(few)}.")
    for name, seen in (report.get("shared") or {}).items():
        if any(count > seen["rows"] for count in seen["of"].values()):
            own = ", ".join(f"{run} {count}" for run, count in seen["of"].items())
            found.append(f"{name}: all columns are over the {seen['rows']} rows that every run answered ({own}).")
    if lost := report["unscored"]:
        found.append(f"{len(lost)} questions have no answer, the first because: {lost[0]['reason']}.")
    for task in report["tasks"]:
        if seen := task.get("contaminated"):
            fate = "trained on all the same" if seen.get("kept") else "dropped"
            found.append(
                f"{task['task']}: {seen['rows']} of {seen['of']} test rows share a passage with training rows, which were {fate}."
            )
    if said := export_sentence(report["story"].get("export")):
        found.append(said)
    return found + [f"{item['task']}: {item['reason']}." for item in report["not_scored"]]


def notes(report: Mapping[str, Any]) -> list[str]:
    """Explanations of the numbers, one sentence each."""
    judged = report.get("judged")
    of_judge = [JUDGED.format(judged["judge"])] if judged else []
    signatures = [f"{METRICS[name].title}: {text}." for name, text in report["signatures"].items()]
    return [*NOTES, f"Choices are ranked by {report['ranking']['meaning']}.", *of_judge, *signatures]


def settings(report: Mapping[str, Any]) -> str:
    """Settings with which the same report is made again, in one line."""
    asked = report["settings"]
    subjects = "; ".join(f"{subject['name']} = {subject['folder']} ({subject['layout']} layout)" for subject in report["subjects"])
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return (
        f"{asked['max_examples']} test rows per task at most, {asked['templates_per_row']} wordings of each, seed {report['seed']},"
        f" replies of at most {asked['max_new_tokens']} tokens, {report['resamples']} resamples; {subjects}; {versions};"
        f" {report['created']}, {report['seconds']:.0f} s."
    )


def _difference_title(report: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    titles = {other["key"]: other["title"] for other in report["columns"]}
    return f"{column['title']} − {titles[column['against']]}"


def _number(value: float | None) -> TableCell:
    return TableCell("–" if value is None else f"{value:.1f}")


def _named(name: str, line: Mapping[str, Any]) -> TableCell:
    """First cell of a line: the name of its task or cluster, marked where it was not trained on."""
    return TableCell(name, line["exposure"] if line["exposure"] in TAGS else "")


def _rows_fewer(task: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    """Number of rows of a difference, where one of the two columns beside it has more."""
    found = task["differences"].get(column["key"])
    if found is None or all(task["columns"][key]["rows"] == found["rows"] for key in (column["key"], column["against"])):
        return ""
    return f" on {found['rows']} rows"


def _difference(found: Mapping[str, Any] | None, over: str = "") -> TableCell:
    if found is None:
        return TableCell("–")
    low, high = found["interval"]
    p = f"p {found['p']:.3f}" if found["p"] >= 0.001 else "p < 0.001"
    return TableCell(
        f"{found['mean']:+.1f} ({low:+.1f} to {high:+.1f}){over}, {p}",
        found["verdict"] if found["verdict"] != "unclear" else "",
    )


def _rows(header: Sequence[str], rows: Sequence[Sequence[TableCell]]) -> list[str]:
    """A Markdown table; all but the first column to the right."""
    texts = [[f"{cell.text} ({TAGS[cell.mark]})" if cell.mark in TAGS else cell.text for cell in row] for row in rows]
    lines = [f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |" for row in (header, *texts)]
    return [lines[0], "|---" + "|---:" * (len(header) - 1) + "|", *lines[1:]]
