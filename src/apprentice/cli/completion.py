"""Completion of arguments in the shell: recipes, keys of a recipe with their values, and runs.

`apprentice --install-completion` sets it up for bash, zsh, fish and PowerShell.
"""

from __future__ import annotations

import typer


def complete_recipe(incomplete: str) -> list[str]:
    """Names of shipped recipes that begin with `incomplete`; the shell itself completes file names where there are none."""
    from apprentice.recipe.recipe_file import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def complete_key(incomplete: str) -> list[str]:
    """Keys of a recipe that begin with `incomplete`, the blocks' among them."""
    from apprentice.recipe.explain import all_keys

    return [key for key in all_keys() if key.startswith(incomplete)]


def complete_override(incomplete: str) -> list[str]:
    """`key=` for every key that takes a value, and behind `key=` the values that the key may have."""
    from apprentice.recipe.explain import all_keys, possible_values, takes_value

    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={one}" for one in possible_values(key) if one.startswith(value)]
    return [f"{one}=" for one in all_keys() if one.startswith(key) and takes_value(one)]


def complete_run(context: typer.Context, incomplete: str) -> list[str]:
    """Names of the runs in `--storage`, or in ./runs."""
    from pathlib import Path

    folder = Path(context.params.get("storage") or "./runs")
    if not folder.is_dir():
        return []
    return sorted(file.parent.name for file in folder.glob("*/identity.json") if file.parent.name.startswith(incomplete))
