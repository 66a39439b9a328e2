"""The `apprentice` command: parses, calls road.py and check.py, prints.

Exit codes: 0 done, 1 the user can mend it, 2 wrong usage, 3 our fault. Imports nothing heavy, so that `--help` is instant.
"""

from __future__ import annotations

import platform
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from apprentice import __version__
from apprentice.console import Screen
from apprentice.errors import ApprenticeError

app = typer.Typer(
    help="From many labelled datasets to one model that follows instructions, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RecipeFile = Annotated[str, typer.Argument(help="Recipe file, or the name of one that is shipped.", metavar="RECIPE")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: key.path=value …", metavar="KEY=VALUE")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]
Restart = Annotated[bool, typer.Option(help="Start the run over, removing what is there.")]
Storage = Annotated[str, typer.Option(help="Where runs lie.")]


@app.command()
def quickstart(
    short: Annotated[bool, typer.Option(help="A few steps only, to see that everything works.")] = False,
    storage: Storage = "./runs",
    json: Json = False,
) -> None:
    """The whole road on the built-in mixture and a real 135M model, offline of any hub."""
    from apprentice import quickstart as demo

    screen = _screen(json)
    result = demo.run(storage, short=short, screen=screen)
    screen.result(result)


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None, json: Json = False) -> None:
    """Everything that can be known before a GPU is reserved; exit code 1 if the recipe is not ready."""
    from apprentice import road

    screen = _screen(json)
    findings = road.check_recipe(_recipe(recipe, overrides))
    for finding in findings:
        screen.say(f"{'ok ' if finding.ok else 'NO '} {finding.subject:<10} {finding.message}")
    ready = all(finding.ok for finding in findings)
    screen.result({"ready": ready, "findings": [finding.as_dict() for finding in findings]}, "ready" if ready else "not ready")
    if not ready:
        raise typer.Exit(1)


@app.command()
def tasks(name: Annotated[str | None, typer.Argument(help="A task's name.")] = None, json: Json = False) -> None:
    """The library of tasks, or one task with its wordings."""
    from apprentice.tasks.loading import find_tasks, library, load_task

    screen = _screen(json)
    if name is not None:
        from apprentice.tasks.description import describe

        task = find_tasks(name, Path.cwd())[0]
        screen.result(task.model_dump(mode="json", exclude_none=True), describe(task))
        return
    found = [load_task(path) for path in library().values()]
    rows = [{"name": t.name, "cluster": t.cluster, "wordings": len(t.templates), "metrics": list(t.metrics)} for t in found]
    if not json:
        screen.show(
            _table(
                ["task", "cluster", "wordings", "metrics", "summary"],
                [[*map(_cell, r.values()), t.summary] for r, t in zip(rows, found, strict=True)],
            )
        )
    screen.result({"tasks": rows})


@app.command()
def preview(
    recipe: RecipeFile,
    overrides: Overrides = None,
    number: Annotated[int, typer.Option("-n", help="How many examples.")] = 5,
    html: Annotated[Path | None, typer.Option(help="Write a page instead.")] = None,
    json: Json = False,
) -> None:
    """Rendered examples, with the tokens that are trained on marked."""
    from apprentice import road
    from apprentice.data import preview as view

    screen = _screen(json)
    shown = road.preview(_recipe(recipe, overrides), number)
    if html is not None:
        html.write_text(view.to_html(shown), encoding="utf-8")
        screen.say(f"wrote {html}")
    elif not json:
        screen.show(view.to_text(shown))
    screen.result({"examples": [item.as_dict() for item in shown]})


@app.command()
def prepare(recipe: RecipeFile, overrides: Overrides = None, restart: Restart = False, json: Json = False) -> None:
    """Freeze each task's index and show what the run will train on."""
    from apprentice import road

    screen = _screen(json)
    loaded = _recipe(recipe, overrides)
    result = road.prepare(loaded, restart=restart, progress=screen.progress)
    screen.result(
        result, f"{result['train_rows']} training rows of {result['tasks']} tasks, {result['steps']} steps\n{result['run']}"
    )


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None, restart: Restart = False, json: Json = False) -> None:
    """Fine-tune; prints the run folder last."""
    from apprentice import road

    screen = _screen(json)
    result = road.train(_recipe(recipe, overrides), restart=restart, progress=screen.progress)
    screen.result(result, road.training_sentence(result) + f"\n{result['run']}")


@app.command()
def runs(storage: Storage = "./runs", json: Json = False) -> None:
    """What there is: name, state, steps, loss, score."""
    from apprentice import road

    screen = _screen(json)
    found = road.runs(storage)
    if not json:
        columns = ["name", "state", "step", "loss", "validation_loss", "score", "updated"]
        screen.show(_table(columns, [[_cell(run.get(column)) for column in columns] for run in found]))
    screen.result({"runs": found})


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="A recipe, a run, or a model (folder or hub id).", metavar="RECIPE|RUN|MODEL")],
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option(help="The recipe whose tasks a bare model is scored on.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the report goes; a run keeps its own.")] = None,
    storage: Storage = "./runs",
    json: Json = False,
) -> None:
    """Score base and tuned model side by side; writes report.json, report.md and report.html."""
    from apprentice import road

    screen = _screen(json)
    report, folder = road.evaluate(target, overrides or [], recipe=recipe, out=out, storage=storage, progress=screen.progress)
    text = (folder / "report.md").read_text(encoding="utf-8")
    screen.result(report, f"{text}\n{folder / 'report.html'}")


@app.command()
def serve(
    target: Annotated[str, typer.Argument(help="A run or a model (folder or hub id).", metavar="RUN|MODEL")],
    host: Annotated[str | None, typer.Option(help="Address to listen on; loopback by default.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    contract: Annotated[str | None, typer.Option(help="Run whose prompt contract a bare model takes.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe whose layout a bare model takes.")] = None,
    storage: Storage = "./runs",
) -> None:
    """The endpoint and the playground on one port, until Ctrl-C."""
    from apprentice import road

    screen = _screen(as_json=False)
    with road.endpoint(
        target, host=host, port=port, contract=contract, recipe=recipe, storage=storage, progress=screen.progress
    ) as url:
        screen.say(f"serving {target} at {url}  (playground: {url}/, API: {url}/v1, stop with Ctrl-C)")
        road.wait_for_stop()
    screen.say("stopped")


@app.command()
def ask(
    instruction: Annotated[str, typer.Argument(help="What to do.")],
    input: Annotated[str, typer.Option(help="What to do it with.")] = "",
    url: Annotated[str, typer.Option(help="A running endpoint.")] = "http://127.0.0.1:8000",
    max_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.")] = 128,
    json: Json = False,
) -> None:
    """One request against a running endpoint."""
    from apprentice import road

    screen = _screen(json)
    reply = road.ask(url, instruction, input, max_tokens=max_tokens)
    screen.result({"reply": reply}, reply)


@app.command("recipe-schema")
def recipe_schema() -> None:
    """The JSON Schema of a recipe, for editors."""
    import json

    from apprentice.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


def main() -> None:
    """Entry point of the `apprentice` command."""
    screen = Screen(as_json="--json" in sys.argv)
    try:
        app()
    except ApprenticeError as error:
        screen.error(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        screen.error("stopped by Ctrl-C; a run goes on where it was when the same command is given again.")
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        screen.error(
            f"this is a fault of apprentice {__version__} (Python {platform.python_version()});"
            " please report it with the lines above at the project's issue tracker."
        )
        sys.exit(3)


def _screen(as_json: bool) -> Screen:
    return Screen(as_json=as_json)


def _recipe(name: str, overrides: list[str] | None) -> Any:
    from apprentice.recipe import find_recipe, load_recipe

    return load_recipe(find_recipe(name), overrides or [])


def _table(columns: list[str], rows: list[list[str]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
