"""Commands about this machine and the keys of recipes and task files: doctor, recipe, recipe-schema, task-schema."""

from __future__ import annotations

from typing import Annotated

import typer

from apprentice.cli.completion import complete_key
from apprentice.cli.options import Json, Storage, screen_for

_MARKS = {"works": "ok", "limited": "--", "broken": "NO"}


def doctor(storage: Storage = "./runs", json: Json = False) -> None:
    """Examine this machine: what works, what does not, and what to do; exit code 1 if something needed is broken."""
    from apprentice import pipeline

    screen = screen_for(json)
    diagnoses = []
    with screen.waiting("versions, processors, storage, the hub"):
        for diagnosis in pipeline.examine_machine(storage):
            diagnoses.append(diagnosis)
            screen.say(f"{_MARKS[diagnosis.state]} {diagnosis.subject:<13} {diagnosis.message}")
    broken = [diagnosis.subject for diagnosis in diagnoses if diagnosis.state == "broken"]
    verdict = f"broken: {', '.join(broken)}" if broken else "ready"
    screen.result({"ready": not broken, "diagnoses": [diagnosis.as_dict() for diagnosis in diagnoses]}, verdict)
    if broken:
        raise typer.Exit(1)


def recipe(
    key: Annotated[
        str, typer.Argument(help="A key, such as training.optimizer.learning_rate.", metavar="KEY", autocompletion=complete_key)
    ] = "",
    json: Json = False,
) -> None:
    """Explain a key of a recipe: type, default, meaning, an example; without KEY, the blocks of a recipe."""
    from apprentice.recipe.explain import explain_key

    explanation = explain_key(key)
    screen_for(json).result(explanation.as_dict(), str(explanation))


def recipe_schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    import json

    from apprentice.recipe import Recipe

    screen_for(False).result({}, json.dumps(Recipe.model_json_schema(), indent=2))


def task_schema() -> None:
    """Print the JSON Schema of a task file, for editors."""
    import json

    from apprentice.tasks.schema import Task

    screen_for(False).result({}, json.dumps(Task.model_json_schema(), indent=2))
