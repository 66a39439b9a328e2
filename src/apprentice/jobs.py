"""What the scripts in `jobs/` share: arguments, progress as plain lines, and exit codes as the command line has them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from apprentice.console import Screen
from apprentice.errors import ApprenticeError
from apprentice.recipe import Recipe, find_recipe, load_recipe
from apprentice.road import Progress


def run_job(stage: Callable[[Recipe, Progress], None]) -> None:
    """Runs `stage` on the recipe that the command line names; exit code 1 with one sentence where the user can mend it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", required=True, help="recipe file, or the name of one that is shipped")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, such as storage=/shared/runs")
    arguments = parser.parse_args()
    screen = Screen()
    try:
        stage(load_recipe(find_recipe(arguments.recipe), arguments.overrides), screen.progress)
    except ApprenticeError as error:
        screen.error(str(error))
        sys.exit(1)
