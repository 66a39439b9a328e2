"""Commands on tasks and data: init, check, tasks, preview, trace, prepare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from apprentice.cli.completion import complete_run
from apprentice.cli.options import Json, Overrides, RecipeFile, Restart, Storage, Trust, cell, read_recipe, screen_for, task_table
from apprentice.console import Screen


def init(
    file: Annotated[
        Path,
        typer.Argument(help="Your rows: CSV, JSON lines, Parquet or Arrow; or owner/name of a dataset on the hub.", metavar="FILE"),
    ],
    instruction: Annotated[str | None, typer.Option(help="Column with what is asked, if each row says it.")] = None,
    input: Annotated[list[str] | None, typer.Option(help="Column that is shown with the question; repeatable.")] = None,
    answer: Annotated[str | None, typer.Option(help="Column with the text to write.")] = None,
    label: Annotated[str | None, typer.Option(help="Column with the label to choose.")] = None,
    choices: Annotated[
        str | None,
        typer.Option(help="Names of the labels in the order of their values: no,yes. Or the columns with each row's choices."),
    ] = None,
    encoding: Annotated[str | None, typer.Option(help="What the file is written in, such as cp1252, if not UTF-8.")] = None,
    test: Annotated[Path | None, typer.Option(help="A file of test rows; else a tenth of the rows is kept back.")] = None,
    base: Annotated[str, typer.Option(help="The model to tune.")] = "smollm2-135m-instruct",
    out: Annotated[Path | None, typer.Option(help="The new folder; named after the file by default.")] = None,
    json: Json = False,
) -> None:
    """Write a task file and a recipe for your own table; columns are guessed by their names unless you name them."""
    from apprentice import pipeline

    screen = screen_for(json)
    names = tuple(name.strip() for name in choices.split(",")) if choices else ()
    table = pipeline.TableDescription(instruction, tuple(input or ()), answer, label, names, encoding)
    ask = (lambda question: str(typer.prompt(question, default="", show_default=False))) if screen.can_ask else None
    summary = pipeline.create_project(file, out, table, test=test, base=base, ask=ask)
    columns = "".join(f"\n  {kind:<12} {cell(value)}" for kind, value in summary["columns"].items())
    left_out = f", {summary['left_out']} left out that lack a value" if summary["left_out"] else ""
    screen.result(
        summary,
        f"{summary['train_rows']} training and {summary['test_rows']} test rows{left_out}; columns:{columns}\n"
        f"{'Next' if summary['task'] is None else 'Look at the wordings in ' + summary['task'] + ', then'}:"
        f" apprentice check {summary['recipe']}",
    )


def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="Estimate instead whether and how fast it would train on these GPUs: 8xH100-80GB, or nodes too, 4x8xH100-80GB."
            " Needs no Ray, no GPU and of the model only config.json."
        ),
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Only what needs neither Ray nor a pass of the model.")] = False,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Check everything that can be known before a GPU is reserved; exit code 1 if the recipe is not ready, or would not fit."""
    from apprentice import pipeline

    screen = screen_for(json)
    if hardware is not None:
        _check_hardware(pipeline.estimate_on_hardware(read_recipe(recipe, overrides, trust=trust), hardware), screen)
        return
    findings = []
    with screen.waiting("the data, the model, then Ray and a pass of the model" if not fast else "the data and the model"):
        for finding in pipeline.check_recipe(read_recipe(recipe, overrides, trust=trust), fast=fast):
            findings.append(finding)
            screen.say(f"{'ok ' if finding.ok else 'NO '} {finding.subject:<10} {finding.message}")
    ready = all(finding.ok for finding in findings)
    verdict = "not ready" if not ready else "ready" if not fast else "ready as far as it was looked at (--fast)"
    screen.result({"ready": ready, "findings": [finding.as_dict() for finding in findings]}, verdict)
    if not ready:
        raise typer.Exit(1)


def _check_hardware(report: Any, screen: Screen) -> None:
    for mark, subject, sentence in report.lines():
        screen.say(f"{mark:<3} {subject:<10} {sentence}")
    fits = report.estimate.fits
    screen.result(report.as_dict(), "fits" if fits else "does not fit")
    if not fits:
        raise typer.Exit(1)


def tasks(name: Annotated[str | None, typer.Argument(help="A task's name, or a cluster's.")] = None, json: Json = False) -> None:
    """List the library of tasks, or show one task with its wordings."""
    from apprentice.tasks.describe import UNKNOWN, describe, training_rows
    from apprentice.tasks.registry import find_tasks, library, load_task

    screen = screen_for(json)
    chosen = [load_task(path) for path in library().values()] if name is None else find_tasks(name, Path.cwd())
    if name is not None and len(chosen) == 1:
        screen.result(chosen[0].model_dump(mode="json", exclude_none=True), describe(chosen[0]))
        return
    chosen.sort(key=lambda task: (task.cluster, task.name))
    rows = [
        {
            "name": task.name,
            "cluster": task.cluster,
            "wordings": len(task.templates),
            "inverted": len(task.inverted_templates),
            "chain_of_thought": len(task.cot_templates),
            "metrics": list(task.metrics),
            "train_rows": training_rows(task),
            "summary": task.summary,
        }
        for task in chosen
    ]
    if not json:
        screen.show(task_table(rows, UNKNOWN))
    clusters = len({task.cluster for task in chosen})
    screen.result(
        {"tasks": rows},
        f"\n{len(chosen)} tasks in {clusters} cluster{'s' * (clusters > 1)}; `apprentice tasks NAME` shows one with its wordings",
    )


def preview(
    recipe: RecipeFile,
    overrides: Overrides = None,
    number: Annotated[int, typer.Option("-n", help="How many examples.")] = 5,
    html: Annotated[Path | None, typer.Option(help="Write a page of packed rows instead, in colours.")] = None,
    json: Json = False,
) -> None:
    """Show rendered examples, with the tokens that are trained on marked."""
    from apprentice import pipeline
    from apprentice.data.inspect import preview as view

    screen = screen_for(json)
    if html is not None:
        html.write_text(pipeline.preview_html(read_recipe(recipe, overrides), number), encoding="utf-8")
        screen.result({"page": str(html)}, f"wrote {html}")
        return
    shown = pipeline.preview_examples(read_recipe(recipe, overrides), number)
    if not json:
        screen.show(view.to_text(shown))
    screen.result({"examples": [item.as_dict() for item in shown]})


def trace(
    run: Annotated[str, typer.Argument(help="A run: its name, or its folder.", autocompletion=complete_run)],
    step: Annotated[int | None, typer.Option(help="An optimizer step, counted from 1.")] = None,
    position: Annotated[int | None, typer.Option(min=0, help="A position of the plan.")] = None,
    storage: Storage = "./runs",
    json: Json = False,
) -> None:
    """Show the examples of an optimizer step: task, row, wording, exemplars and text."""
    from apprentice import pipeline
    from apprentice.data.inspect import preview as view

    if (step is None) == (position is None):
        raise typer.BadParameter("give either --step or --position")
    screen = screen_for(json)
    shown = pipeline.trace_examples(run, storage, step=step, position=position)
    if not json:
        screen.show(view.to_text(shown))
    screen.result({"examples": [item.as_dict() for item in shown]})


def prepare(
    recipe: RecipeFile, overrides: Overrides = None, restart: Restart = False, trust: Trust = False, json: Json = False
) -> None:
    """Freeze each task's index and show what the run will train on."""
    from apprentice import pipeline

    screen = screen_for(json)
    loaded = read_recipe(recipe, overrides, trust=trust)
    result = pipeline.prepare_run(loaded, restart=restart, progress=screen.progress)
    screen.result(
        result, f"{result['train_rows']} training rows of {result['tasks']} tasks, {result['steps']} steps\n{result['run']}"
    )
