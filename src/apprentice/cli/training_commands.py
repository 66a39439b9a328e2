"""Commands that train, list runs and export models: quickstart, train, runs, export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from apprentice.cli.completion import complete_run
from apprentice.cli.options import Json, Overrides, RecipeFile, Restart, Storage, Trust, cell, read_recipe, screen_for, table_of

COLUMNS = ["name", "state", "step", "loss", "validation_loss", "score", "updated"]


def quickstart(
    short: Annotated[bool, typer.Option(help="A few steps only, to see that everything works.")] = False,
    storage: Storage = "./runs",
    json: Json = False,
) -> None:
    """Run the whole pipeline on the built-in mixture and a real 135M model, offline of any hub."""
    from apprentice.pipeline import quickstart as demo

    screen = screen_for(json)
    result = demo.run(storage, short=short, screen=screen)
    screen.result(result)


def train(
    recipe: RecipeFile, overrides: Overrides = None, restart: Restart = False, trust: Trust = False, json: Json = False
) -> None:
    """Fine-tune, or resume a run that stopped; prints the run folder last."""
    from apprentice import pipeline

    screen = screen_for(json)
    loaded = read_recipe(recipe, overrides, trust=trust)
    try:
        result = pipeline.train_run(loaded, restart=restart, progress=screen.progress)
    except KeyboardInterrupt:
        screen.error(pipeline.stopped_sentence(loaded))
        raise typer.Exit(1) from None
    screen.result(result, pipeline.training_sentence(result) + f"\n{result['run']}")


def runs(
    run: Annotated[
        str | None, typer.Argument(help="Name or folder of one run: shows where its time went.", autocompletion=complete_run)
    ] = None,
    storage: Storage = "./runs",
    json: Json = False,
) -> None:
    """List the runs: name, state, steps, loss, score; or show one, with its goodput."""
    from apprentice import pipeline

    screen = screen_for(json)
    if run is not None:
        described = pipeline.describe_run(run, storage)
        shown = [f"{column} {_shown(described, column)}" for column in COLUMNS if described.get(column) is not None]
        screen.result(described, ", ".join(shown) + f"\n{described['sentence']}\n{described['run']}")
        return
    listed = pipeline.list_runs(storage)
    if not json:
        screen.show(table_of(COLUMNS, [[_shown(values, column) for column in COLUMNS] for values in listed]))
    screen.result({"runs": listed})


def _shown(run: Mapping[str, Any], column: str) -> str:
    """One column of a run as text; the score also names the metrics that it is the mean of."""
    metrics = run.get("score_metrics") if column == "score" else None
    return cell(run.get(column)) + (f" ({', '.join(metrics)})" if metrics else "")


def export(
    run: Annotated[str, typer.Argument(help="Name or folder of a trained run.", metavar="RUN", autocompletion=complete_run)],
    folder: Annotated[str, typer.Argument(help="New folder for the model.", metavar="DIR")],
    form: Annotated[
        str, typer.Option("--format", help="safetensors, adapter (without its base), gguf, or gguf:q8_0, f16, bf16, f32.")
    ] = "safetensors",
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest mean divergence from the run's model, in nats a token, on its validation rows.")
    ] = 0.05,
    push: Annotated[
        str | None, typer.Option(help="Also upload to this repository of the Hugging Face hub.", metavar="HUB_ID")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody read the repository; it is private otherwise.")] = False,
    storage: Storage = "./runs",
    json: Json = False,
) -> None:
    """Export weights, tokenizer and prompt contract into one folder, with a model card and a certificate of equivalence."""
    from apprentice import pipeline

    screen = screen_for(json)
    options = pipeline.ExportOptions(format=form, tolerance=tolerance, push=push, public=public)
    result = pipeline.export_run(run, folder, storage=storage, options=options)
    divergence = result["equivalence"]["mean_kl"]["value"]
    lines = [f"{result['bytes'] / 1e6:.0f} MB, {divergence:.1e} nats a token from the run's model", result["folder"]]
    screen.result(result, "\n".join([*lines, *([result["url"]] if "url" in result else [])]))
