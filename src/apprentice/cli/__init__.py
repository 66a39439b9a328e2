"""The `apprentice` command: parses arguments, calls the pipeline's stages, prints results.

Exit codes: 0 done, 1 an error that the user can correct, 2 wrong usage, 3 a bug in apprentice. Heavy imports stand inside the
commands, so that `--help` is instant.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from apprentice import __version__
from apprentice.cli import cluster_commands, data_commands, evaluation_commands, serving_commands, training_commands
from apprentice.console import Screen

app = typer.Typer(
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def about(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """From many labelled datasets to one model that follows instructions, on Ray."""
    if version:
        Screen().result({}, f"apprentice {__version__}")
        raise typer.Exit


# In the order in which a new user needs them.
for command in (
    training_commands.quickstart,
    data_commands.init,
    data_commands.check,
    data_commands.tasks,
    data_commands.preview,
    data_commands.prepare,
    training_commands.train,
    training_commands.runs,
    data_commands.trace,
    evaluation_commands.evaluate,
    evaluation_commands.report,
    evaluation_commands.compare,
    evaluation_commands.report_schema,
    evaluation_commands.predict,
    training_commands.export,
    serving_commands.serve,
    serving_commands.ask,
    serving_commands.key,
    cluster_commands.submit,
    data_commands.recipe_schema,
):
    app.command(command.__name__.replace("_", "-"))(command)


def main() -> None:
    """Entry point of the `apprentice` command."""
    screen = Screen(as_json="--json" in sys.argv)
    try:
        app()
    except KeyboardInterrupt:
        screen.error("stopped by Ctrl-C; a run goes on where it was when the same command is given again.")
        sys.exit(1)
    except SystemExit as end:
        is_help_cut_off = "--help" in sys.argv and isinstance(end.__context__, BrokenPipeError)  # as by `| head -1`
        sys.exit(0 if is_help_cut_off else end.code)
    except Exception as error:
        sys.exit(screen.failed(error))
