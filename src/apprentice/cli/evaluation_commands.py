"""Commands that score models and show reports: evaluate, report, report-schema, compare, predict."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from apprentice.cli.completion import complete_run
from apprentice.cli.options import Json, Overrides, Storage, Trust, screen_for, with_trust

Out = Annotated[Path | None, typer.Option(help="Where the report goes; a run keeps its own.")]


def evaluate(
    target: Annotated[str, typer.Argument(help="A recipe, a run, or a model (folder or hub id).", metavar="RECIPE|RUN|MODEL")],
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option(help="The recipe whose tasks a bare model is scored on.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="A task or cluster to score instead of the recipe's; repeatable.")] = None,
    against: Annotated[str | None, typer.Option(help="Another run or model to compare with instead of the base.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Address of an OpenAI-compatible endpoint to ask instead.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name at the endpoint; the first it lists by default.")] = None,
    key_env: Annotated[str, typer.Option(help="Environment variable that holds the endpoint's key.")] = "OPENAI_API_KEY",
    restart: Annotated[bool, typer.Option(help="Ask everything again, also what was answered before.")] = False,
    out: Out = None,
    storage: Storage = "./runs",
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Score base and tuned model side by side; writes report.json, report.md and report.html."""
    from apprentice import pipeline

    screen = screen_for(json)
    options = pipeline.EvaluationOptions(
        recipe=recipe,
        tasks=tuple(tasks or ()),
        against=against,
        endpoint=endpoint,
        model=model,
        key=os.environ.get(key_env),
        out=out,
        restart=restart,
        storage=storage,
    )
    result, folder = pipeline.evaluate_target(target, with_trust(overrides, trust), options=options, progress=screen.progress)
    _show(screen, result, folder)


def report(
    target: Annotated[
        str, typer.Argument(help="A run, or a folder with predictions.parquet.", metavar="RUN|FOLDER", autocompletion=complete_run)
    ],
    storage: Storage = "./runs",
    json: Json = False,
) -> None:
    """Make a report again from its predictions, without any model."""
    from apprentice import pipeline

    _show(screen_for(json), *pipeline.rebuild_report(target, storage))


def report_schema() -> None:
    """Print the JSON Schema of report.json, for programs that read reports."""
    import json

    from apprentice.evaluate.report.report_schema import Report

    screen_for(False).result({}, json.dumps(Report.model_json_schema(), indent=2))


def compare(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="Runs that were scored; the first is what the others meet.", metavar="RUN", autocompletion=complete_run
        ),
    ],
    out: Out = None,
    storage: Storage = "./runs",
    json: Json = False,
) -> None:
    """Compare several evaluated runs in one report, question by question."""
    from apprentice import pipeline

    _show(screen_for(json), *pipeline.compare_runs(targets, out, storage))


def predict(
    target: Annotated[
        str, typer.Argument(help="A run or a model (folder or hub id).", metavar="RUN|MODEL", autocompletion=complete_run)
    ],
    file: Annotated[str, typer.Argument(help="JSONL or Parquet with `instruction` and, if need be, `input`; a path or URI.")],
    out: Annotated[str | None, typer.Option(help="Folder for the replies; beside the file by default.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.")] = 128,
    contract: Annotated[str | None, typer.Option(help="Run whose prompt contract a bare model takes.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe whose layout a bare model takes.")] = None,
    restart: Annotated[bool, typer.Option(help="Start over, removing the replies that are there.")] = False,
    storage: Storage = "./runs",
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Write replies to every row of a file, as Parquet; rows that cannot be asked are listed beside them."""
    from apprentice import pipeline

    screen = screen_for(json)
    result = pipeline.predict_file(
        target,
        file,
        out,
        max_tokens=max_tokens,
        contract=contract,
        recipe=recipe,
        restart=restart,
        storage=storage,
        trust=trust,
        progress=screen.progress,
    )
    bad = f", {result['bad_rows']} bad ones listed in bad_rows.jsonl" if result["bad_rows"] else ""
    screen.result(result, f"{result['rows']} rows in {result['parts']} parts{bad}\n{result['out']}")


def _show(screen: Any, result: dict[str, Any], folder: Any) -> None:
    """Prints a report; exits with code 1 if questions have no answer or the quality gate was not passed."""
    from apprentice.evaluate.report.quality_gate import verdict_sentence
    from apprentice.evaluate.report.report_schema import GateVerdict

    text = (folder / "report.md").read_text()
    screen.result(result, f"{text}\n{folder / 'report.html'}")
    failed = []
    if result["unscored"]:
        lost = result["unscored"]
        remembered = all(subject["weights_sha256"] for subject in result["subjects"] if subject["name"] == lost[0]["subject"])
        again = "the same command asks only for these"
        if not remembered:
            again = "the same command asks all again, as the endpoint does not say which weights answer"
        failed.append(
            f"{len(lost)} questions have no answer (the first: {lost[0]['task']} row {lost[0]['row']}, {lost[0]['reason']});"
            f" all others are in the report, and {again}."
        )
    if result["gate"] and not result["gate"]["passed"]:
        failed.append(verdict_sentence(GateVerdict.model_validate(result["gate"])))
    for line in failed:
        screen.error(line, beside_result=True)
    if failed:
        raise typer.Exit(1)
