"""Every recipe that is shipped loads, and names tasks that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from apprentice.recipe import SHIPPED, load_recipe
from apprentice.tasks.loading import select_tasks

RECIPES = sorted(SHIPPED.glob("*.yaml"))


def test_there_are_recipes():
    assert {file.stem for file in RECIPES} >= {"quickstart", "flan_mini"}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_loads_and_its_tasks_exist(file: Path):
    recipe = load_recipe(file)
    tasks, held_out = select_tasks(recipe.data.tasks, recipe.data.hold_out, file.parent)
    assert len(tasks) >= 8
    assert 0 < len(held_out) < len(tasks)
    assert file.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=")
