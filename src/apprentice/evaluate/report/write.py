"""The report's numbers as files: report.json for programs, report.md for a pull request, report.html for reading.

The same numbers give the same files.
"""

from __future__ import annotations

import re
from importlib.resources import files

import jinja2
import yaml

from apprentice.evaluate.report.examples import select_extremes
from apprentice.evaluate.report.plots import mixture_bars, shot_curves, training_curve, wording_dots
from apprentice.evaluate.report.quality_gate import verdict_sentence
from apprentice.evaluate.report.report_schema import Report
from apprentice.evaluate.report.run_history import export_sentence, time_sentence
from apprentice.evaluate.report.tables import (
    TAGS,
    cluster_table,
    judged_table,
    perturbation_table,
    pool_table,
    task_table,
    to_markdown,
    wording_table,
)
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


def write_report(report: Report, out: Folder) -> None:
    """Writes report.json, report.md and report.html."""
    (out / "report.json").write_json(report.as_json())
    (out / "report.md").write_text(markdown(report))
    (out / "report.html").write_text(html(report))


def markdown(report: Report) -> str:
    """The report as GitHub Markdown."""
    lines = [
        f"## Evaluation of {report.name}",
        "",
        *[f"- {sentence}" for sentence in report.headline or [report.summary.sentence]],
        *([f"- {verdict_sentence(report.gate)}"] if report.gate else []),
        "",
        *to_markdown(*task_table(report)),
        "",
        "### By kind of task",
        "",
        *to_markdown(*pool_table(report)),
        "",
        "### By cluster",
        "",
        *to_markdown(*cluster_table(report)),
        "",
        "### Wordings",
        "",
        *to_markdown(*wording_table(report)),
        "",
    ]
    if report.judged:
        lines += ["### Judged by a reward model", "", *to_markdown(*judged_table(report)), ""]
    lines += [f"- {remark}" for remark in remarks(report)]
    lines += ["", *[f"<sub>{note}</sub><br>" for note in notes(report)], "", f"<sub>{settings_line(report)}</sub>", ""]
    return "\n".join(lines)


def html(report: Report) -> str:
    """The report as one page that needs nothing else."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["typeset"] = _typeset
    template = environment.from_string((files("apprentice.evaluate.report") / "report.html.jinja").read_text(encoding="utf-8"))
    tables = [("By cluster", *cluster_table(report)), ("By kind of task", *pool_table(report)), ("Tasks", *task_table(report))]
    details = [("Wordings in numbers", *wording_table(report))]
    if report.judged:
        tables.append(("Judged by a reward model", *judged_table(report)))
    if any(cell.perturbations for task in report.tasks for cell in task.columns.values()):
        details.append(("Wordings changed on purpose", *perturbation_table(report)))
    return template.render(
        report=report,
        gate=verdict_sentence(report.gate) if report.gate else None,
        titles=report.titles,
        tags=TAGS,
        tables=tables,
        details=details,
        pictures=_plots(report),
        extremes=[
            ("The ten best", select_extremes(report.tasks, "best")),
            ("The ten worst", select_extremes(report.tasks, "worst")),
        ],
        remarks=remarks(report),
        notes=notes(report),
        settings=settings_line(report),
        recipe=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True),
    )


def _typeset(text: str) -> str:
    """The text with real minus signs before numbers."""
    return re.sub(r"(?<!\w)-(?=\d)", "−", text)


def _plots(report: Report) -> list[tuple[str, str, str]]:
    """Title, plot (SVG) and caption of each plot there is something for."""
    history, ledger = report.story["history"], report.story["ledger"]
    plots = [("Every wording", wording_dots(report), "One dot per wording, a bar at the mean, dotted: the majority answer.")]
    if len({column.shots for column in report.columns[1:]}) > 1:
        plots.append(("With exemplars", shot_curves(report), "Mean over tasks by the number of exemplars, with 95% intervals."))
    if any(record.get("loss") is not None for record in history):
        plots.append(("Training", training_curve(history), "Loss per optimizer step, pale; dark: its running mean."))
    if ledger and ledger.get("tasks"):
        caption = " ".join(["What each task was meant to have, and what it got.", *ledger.get("warnings", [])])
        plots.append(("Mixture", mixture_bars(ledger), caption))
    return plots


def remarks(report: Report) -> list[str]:
    """Remarks below the scores: cut and dropped questions, the export's difference, the training's time, unscored tasks."""
    lines = _question_remarks(report)
    for name, seen in (report.shared or {}).items():
        if any(count > seen.rows for count in seen.of.values()):
            own = ", ".join(f"{run} {count}" for run, count in seen.of.items())
            lines.append(f"{name}: all columns are over the {seen.rows} rows that every run answered ({own}).")
    if report.unscored:
        lines.append(f"{len(report.unscored)} questions have no answer, the first because: {report.unscored[0].reason}.")
    for task in report.tasks:
        if seen_rows := task.contaminated:
            fate = "trained on all the same" if seen_rows.kept else "dropped"
            lines.append(
                f"{task.task}: {seen_rows.rows} of {seen_rows.of} test rows share a passage with training rows, which were {fate}."
            )
    story = report.story
    lines += [line for line in (export_sentence(story.get("export")), time_sentence(story.get("time"))) if line]
    return lines + [f"{item.task}: {item.reason}." for item in report.not_scored]


def _question_remarks(report: Report) -> list[str]:
    """Remarks on each column's questions: cut prompts, questions that could not be asked, exemplars that did not fit."""
    lines = []
    for column in report.columns[1:]:
        cells = [(task.task, task.columns[column.key]) for task in report.tasks if column.key in task.columns]
        total = sum(cell.questions for _, cell in cells)
        truncated = {name: sum(cell.truncated.values()) for name, cell in cells if cell.truncated}
        dropped = {name: sum(cell.dropped.values()) for name, cell in cells if cell.dropped}
        for what, counts in (("prompts were cut to fit", truncated), ("questions could not be asked", dropped)):
            if counts:
                where = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
                lines.append(f"{column.title}: {sum(counts.values())} of {total} {what} ({where}).")
        fitted = [(name, cell.exemplars) for name, cell in cells if cell.exemplars is not None]
        if few := [f"{name} {count:.1f}" for name, count in fitted if count < column.shots - 0.05]:
            lines.append(f"{column.title}: on average fewer exemplars fitted into the prompt: {', '.join(few)}.")
    return lines


def notes(report: Report) -> list[str]:
    """Explanations of the numbers, one sentence each."""
    of_judge = [JUDGED.format(report.judged.judge)] if report.judged else []
    signatures = [f"{METRICS[name].title}: {text}." for name, text in report.signatures.items()]
    return [*NOTES, f"Choices are ranked by {report.ranking.meaning}.", *of_judge, *signatures]


def settings_line(report: Report) -> str:
    """Settings with which the same report is made again, in one line."""
    settings = report.settings
    subjects = "; ".join(f"{subject.name} = {subject.folder} ({subject.layout} layout)" for subject in report.subjects)
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    return (
        f"{settings['max_examples']} test rows per task at most, {settings['templates_per_row']} wordings of each,"
        f" seed {report.seed}, replies of at most {settings['max_new_tokens']} tokens, {report.resamples} resamples;"
        f" {subjects}; {versions}; {report.created}, {report.seconds:.0f} s."
    )
