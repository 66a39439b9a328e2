"""Commands that score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apprentice.cli.options import Json, Overrides, Storage, screen_for


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

    screen = screen_for(json)
    report, folder = road.evaluate(target, overrides or [], recipe=recipe, out=out, storage=storage, progress=screen.progress)
    text = (folder / "report.md").read_text(encoding="utf-8")
    screen.result(report, f"{text}\n{folder / 'report.html'}")
