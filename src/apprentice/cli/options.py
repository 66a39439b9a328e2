"""Arguments, screen and tables that the commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from apprentice.cli.completion import complete_override, complete_recipe
from apprentice.console import Screen

RecipeFile = Annotated[
    str,
    typer.Argument(help="Recipe file, or the name of one that is shipped.", metavar="RECIPE", autocompletion=complete_recipe),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Overrides: key.path=value …", metavar="KEY=VALUE", autocompletion=complete_override),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]
Restart = Annotated[bool, typer.Option(help="Start the run over, removing what is there.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Read pickled weights, and run code that the model brings: model.trust=true in short.")
]
Storage = Annotated[str, typer.Option(help="Where runs lie.")]


def screen_for(as_json: bool) -> Screen:
    """The screen of one command."""
    return Screen(as_json=as_json)


def read_recipe(name: str, overrides: list[str] | None, *, trust: bool = False) -> Any:
    """Loads a recipe, from a file or a shipped one by name, and applies the overrides."""
    from apprentice.recipe import find_recipe, load_recipe

    return load_recipe(find_recipe(name), with_trust(overrides, trust))


def with_trust(overrides: list[str] | None, trust: bool) -> list[str]:
    """The overrides, plus `model.trust=true` if `--trust` was given."""
    return [*(overrides or []), *(["model.trust=true"] if trust else [])]


def table_of(columns: list[str], rows: list[list[str]]) -> Any:
    """A plain table for the screen."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def task_table(rows: list[dict[str, Any]], unknown: str) -> Any:
    """Table of the task library: a heading for each cluster, its tasks below, summaries wrapped to the screen's width."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("cluster, task", no_wrap=True)
    for column in ("wordings", "inverted", "rows"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("metrics")
    table.add_column("summary", ratio=1)
    cluster = None
    for row in rows:
        if row["cluster"] != cluster:
            cluster = row["cluster"]
            table.add_row(Text(cluster, style="bold"))
        train = row["train_rows"]
        counts = (str(row["wordings"]), str(row["inverted"]), unknown if train is None else f"{train:,}")
        table.add_row(f"  {row['name']}", *counts, "\n".join(row["metrics"]), row["summary"])
    return table


def cell(value: Any) -> str:
    """A value as text for a table: `–` for None, a list joined by commas, a float with four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
