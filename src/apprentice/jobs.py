"""What the scripts in `jobs/` share: arguments, progress as plain lines, and exit codes as the command line has them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from apprentice.console import Screen
from apprentice.errors import ApprenticeError
from apprentice.recipe import Recipe, find_recipe, load_recipe
from apprentice.road import Progress, check_order


def run_job(stage: Callable[[Recipe, Progress], None]) -> None:
    """Runs `stage` on each recipe that the command line names, in order; exit code 1 with one sentence for what a user can mend."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--recipe", required=True, action="append", help="recipe file, or the name of one that is shipped; several make a chain"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, such as storage=/shared/runs")
    arguments = parser.parse_args()
    screen = Screen()
    try:
        recipes = [load_recipe(find_recipe(name), arguments.overrides) for name in arguments.recipe]
        check_order(recipes)
        for recipe in recipes:
            stage(recipe, screen.progress)
    except ApprenticeError as error:
        screen.error(str(error))
        sys.exit(1)
