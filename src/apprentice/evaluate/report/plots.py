"""Plots of a report as SVG text: scores by wording, scores by number of exemplars, training curve, mixture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from apprentice.evaluate.report.report_schema import ColumnScores, GroupEntry, Report, TaskEntry
from apprentice.evaluate.report.tables import fewest_shots

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = ("#9aa5b1", "#0f609b", "#c05621", "#2f855a", "#6b46c1", "#b83280")  # the first is for the reference subject
TAGGED = {"held_out": "  (held out)", "scored_only": "  (scored only)"}
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "apprentice",
}


@matplotlib.rc_context(STYLE)
def wording_dots(report: Report) -> str:
    """Plot with a line per task and in it one per subject, at the fewest exemplars: a dot per wording, a bar at the score."""
    columns = fewest_shots(report)
    tasks = [task for task in report.tasks if any(_scores(task, column.key) for column in columns)]
    figure = _figure(7.6, 0.75 + _lines_height(len(tasks), len(columns)))
    axes = figure.subplots()
    step = 0.26
    for line, task in enumerate(tasks):
        if line and task.exposure != tasks[line - 1].exposure:
            axes.axhline(line - 0.5, color=MUTED, linewidth=0.8)
        for number, column in enumerate(columns):
            if not (cell := _scores(task, column.key)):
                continue
            height = line + (number - (len(columns) - 1) / 2) * step
            scores = [wording.score for wording in (cell.wordings or {}).values()]
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(scores, [height] * len(scores), "o", color=colour, alpha=0.6, markersize=4.5, markeredgewidth=0)
            axes.plot([cell.score or 0.0] * 2, [height - 0.12, height + 0.12], color=colour, linewidth=2.2)
        if baseline := _scores(task, report.columns[0].key):
            axes.plot([baseline.score or 0.0] * 2, [line - 0.4, line + 0.4], ":", color=MUTED, linewidth=1.1)
    axes.set_yticks(range(len(tasks)), [f"{task.task}{TAGGED.get(task.exposure, '')}" for task in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("score")
    for number, column in enumerate(columns):
        axes.plot([], [], "o", color=COLOURS[number % len(COLOURS)], label=column.title, markersize=5)
    axes.plot([], [], ":", color=MUTED, label="majority answer")
    figure.legend(loc="outside upper center", ncols=len(columns) + 1, frameon=False)
    axes.grid(axis="x", color=GRID)
    return _svg(figure, axes)


def _lines_height(tasks: int, columns: int) -> float:
    """Height in inches of `tasks` lines with `columns` lines each."""
    return max(1.0, tasks * (0.2 + 0.14 * columns))


@matplotlib.rc_context(STYLE)
def shot_curves(report: Report) -> str:
    """Plot with a panel per pool and a curve per subject: mean score by number of exemplars, with intervals."""
    figure = _figure(7.6, 2.6)
    panels = figure.subplots(1, len(report.pools), sharey=True, squeeze=False)[0]
    subjects = list(dict.fromkeys(column.subject for column in report.columns[1:]))
    for axes, pool in zip(panels, report.pools, strict=True):
        for number, subject in enumerate(subjects):
            _draw_shot_curve(axes, report, pool, subject, COLOURS[number % len(COLOURS)])
        axes.set_title(f"{pool.kind}, {pool.exposure.replace('_', ' ')}", fontsize=9, color=INK)
        axes.set_xlabel("exemplars")
        axes.set_xticks(sorted({column.shots for column in report.columns[1:]}))
        axes.grid(axis="y", color=GRID)
    panels[0].set_ylabel("score")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=max(1, len(subjects)), frameon=False)
    for axes in panels[1:]:
        _quiet(axes)
    return _svg(figure, panels[0])


def _draw_shot_curve(axes: Any, report: Report, pool: GroupEntry, subject: str, colour: str) -> None:
    columns = [column for column in report.columns if column.subject == subject and column.key in pool.columns]
    if not columns:
        return
    means = [pool.columns[column.key] for column in columns]
    errors = [
        [max(0.0, mean.mean - mean.interval[0]) for mean in means],
        [max(0.0, mean.interval[1] - mean.mean) for mean in means],
    ]
    axes.errorbar(
        [column.shots for column in columns],
        [mean.mean for mean in means],
        yerr=errors,
        fmt="o-",
        color=colour,
        label=subject,
        markersize=4,
        capsize=2,
    )


@matplotlib.rc_context(STYLE)
def training_curve(history: Sequence[Mapping[str, Any]]) -> str:
    """Plot of training and validation loss by optimizer step. If a step was repeated after a restart, the last one counts."""
    figure = _figure(7.6, 2.6)
    axes = figure.subplots()
    losses, validation = (
        {record["step"]: record[key] for record in history if record.get(key) is not None} for key in ("loss", "validation_loss")
    )
    axes.plot(list(losses), list(losses.values()), color=COLOURS[1], alpha=0.3, linewidth=0.9)
    axes.plot(list(losses), _running_mean(list(losses.values())), color=COLOURS[1], linewidth=1.6, label="training loss")
    if validation:
        axes.plot(
            list(validation),
            list(validation.values()),
            "o-",
            color=COLOURS[2],
            linewidth=1.3,
            markersize=4,
            label="validation loss",
        )
    axes.legend(frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per target token")
    axes.grid(axis="y", color=GRID)
    return _svg(figure, axes)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred running mean over about a tenth of all values; the window is cut at both ends."""
    reach = len(values) // 20
    parts = [values[max(0, place - reach) : place + reach + 1] for place in range(len(values))]
    return [sum(part) / len(part) for part in parts]


@matplotlib.rc_context(STYLE)
def mixture_bars(ledger: Mapping[str, Any]) -> str:
    """Bar chart of each task's requested share, beside its realised share of examples and of target tokens."""
    tasks = ledger["tasks"]
    names = sorted(tasks, key=lambda name: -tasks[name]["requested_share"])
    figure = _figure(7.6, 0.8 + 0.3 * max(2, len(names)))
    axes = figure.subplots()
    kinds = (("requested_share", GRID, 0.8), ("share_of_examples", COLOURS[1], 0.44), ("share_of_target_tokens", COLOURS[2], 0.16))
    for key, colour, height in kinds:
        values = [100 * tasks[name][key] for name in names]
        axes.barh(range(len(names)), values, height=height, color=colour, label=key.replace("_", " "))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("share of training, %")
    figure.legend(loc="outside upper center", ncols=len(kinds), frameon=False)
    axes.grid(axis="x", color=GRID)
    return _svg(figure, axes)


def _scores(task: TaskEntry, key: str) -> ColumnScores | None:
    """Scores of a task in one column, if any question was answered."""
    cell = task.columns.get(key)
    return cell if cell and cell.score is not None else None


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)  # without pyplot, which has global state and may need a display
    return figure


def _svg(figure: Figure, axes: Any) -> str:
    """Renders the figure as an `<svg>` element; the same numbers give the same text."""
    _quiet(axes)
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def _quiet(axes: Any) -> None:
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    for side in axes.spines.values():
        side.set_color(GRID)
