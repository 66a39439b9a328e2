"""The `apprentice` command: parses arguments, calls the pipeline's stages, prints results.

Exit codes: 0 done, 1 an error that the user can correct or Ctrl-C, 2 wrong usage, 3 a bug in apprentice. Heavy imports stand
inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from apprentice import __version__
from apprentice.cli import (
    board_commands,
    cluster_commands,
    contract_commands,
    data_commands,
    evaluation_commands,
    serving_commands,
    setup_commands,
    training_commands,
)
from apprentice.console import Screen, is_unread

app = typer.Typer(
    no_args_is_help=True,
    invoke_without_command=True,
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
    board_commands.board,
    data_commands.trace,
    evaluation_commands.evaluate,
    evaluation_commands.report,
    evaluation_commands.compare,
    evaluation_commands.report_schema,
    evaluation_commands.predict,
    training_commands.export,
    contract_commands.verify,
    contract_commands.contract_schema,
    serving_commands.serve,
    serving_commands.ask,
    serving_commands.key,
    cluster_commands.submit,
    setup_commands.doctor,
    setup_commands.recipe,
    setup_commands.recipe_schema,
    setup_commands.task_schema,
):
    app.command(command.__name__.replace("_", "-"))(command)


# What Ctrl-C leaves of a command, and how to go on; `train` and `submit --follow` say more themselves.
AFTER_CTRL_C = {
    "quickstart": "what its run has so far stays, and the same command goes on from there.",
    "prepare": "an index that was not finished is made again as a whole by the same command.",
    "train": "the same command begins the run, or goes on with it.",
    "evaluate": "answers that were scored in whole blocks are kept, and the same command asks for the rest.",
    "predict": "what was written in whole blocks is kept, and the same command goes on after it.",
    "export": "the new folder was not made; the same command writes it from the beginning.",
}


def main() -> None:
    """Entry point of the `apprentice` command."""
    screen = Screen(as_json="--json" in sys.argv)
    stdout = sys.stdout
    try:
        app()
    except SystemExit as end:  # typer turns Ctrl-C into exit code 130, and a broken pipe into 1, without a word
        reason = end.__context__
        if end.code == 130 and reason is not None and isinstance(reason.__cause__, KeyboardInterrupt):
            sys.exit(_stopped(screen))
        if isinstance(reason, BrokenPipeError):
            is_of_command = sys.stdout is not stdout  # where a command raised it, and not the help or usage, typer wraps the stream
            is_bug = is_of_command and not is_unread(sys.__stdout__) and not is_unread(sys.__stderr__)
            sys.exit(screen.failed(reason) if is_bug else getattr(reason.__context__, "exit_code", 0))
        sys.exit(end.code)
    except KeyboardInterrupt:
        sys.exit(_stopped(screen))
    except Exception as error:
        sys.exit(screen.failed(error))


def _stopped(screen: Screen) -> int:
    """Says what Ctrl-C left of the command; returns the exit code."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    screen.error(f"stopped by Ctrl-C; {AFTER_CTRL_C.get(command, 'the same command begins again.')}")
    return 1
