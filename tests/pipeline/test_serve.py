"""What the endpoint of a recipe knows besides the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from apprentice.pipeline.serve import find_own_tasks
from apprentice.recipe import Recipe, load_recipe
from apprentice.run.folder import open_run
from apprentice.tasks.registry import library, load_task
from tests.data.small import write_tasks
from tests.support.recipes import tiny_recipe


def test_a_recipes_own_task_files_can_be_asked_and_a_lost_one_is_told(tmp_path: Path) -> None:
    own = yaml.safe_load(library()["ag_news"].read_text()) | {"name": "my_news"}
    (tmp_path / "my_news.yaml").write_text(yaml.safe_dump(own))
    recipe = Recipe.model_validate(
        {
            "name": "own",
            "model": {"base": "anything"},
            "data": {"tasks": ["sst2", str(tmp_path / "my_news.yaml"), str(tmp_path / "lost.yaml")]},
            "training": {"steps": 1},
        }
    )
    messages: list[dict[str, Any]] = []
    tasks = find_own_tasks(recipe, lambda _, values: messages.append(values))
    assert [task.name for task in tasks] == ["my_news"]
    assert [values["message"][:22] for values in messages] == ["not under /v1/tasks: /"]
    assert "lost.yaml does not exist" in messages[0]["message"]


def test_a_run_is_asked_by_the_tasks_that_it_was_made_with(tmp_path: Path, tiny_model: Path) -> None:
    write_tasks(tmp_path)
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, data__tasks=["./sums.yaml", "sst2"], data__hold_out=[]))
    run = open_run(recipe)
    (tmp_path / "sums.yaml").unlink()
    load_task.cache_clear()
    messages: list[dict[str, Any]] = []
    assert [task.name for task in find_own_tasks(recipe, lambda _, values: messages.append(values), run.tasks().find)] == ["sums"]
    assert not messages
