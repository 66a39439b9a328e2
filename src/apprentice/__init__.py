"""apprentice: instruction tuning on Ray, from many labelled datasets to one model that follows instructions.

    import apprentice

    recipe = apprentice.Recipe.load("recipe.yaml", "training.steps=100")
    print(recipe.check())
    training = recipe.train()              # in a process of its own
    for record in training.metrics():      # as they come
        print(record["step"], record.get("loss"))
    run = training.wait()
    report = run.evaluate()
    with run.serve() as client:
        print(client.ask("Is the customer happy?", "The kettle leaks."))

Every name is imported when it is first used, so that `import apprentice` itself loads neither PyTorch nor Ray. Whatever the user
can mend is raised as an `ApprenticeError`, with the sentence that the command line prints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apprentice.console import print_progress
    from apprentice.errors import (
        ApprenticeError,
        ContractError,
        DataError,
        EvaluationError,
        ModelError,
        RecipeError,
        ResourcesError,
        RowError,
        RunError,
        ServingError,
        StorageError,
        TaskError,
        TrainingError,
    )
    from apprentice.python_api.check_result import CheckResult
    from apprentice.python_api.endpoint_client import EndpointClient
    from apprentice.python_api.evaluation_report import EvaluationReport
    from apprentice.python_api.functions import (
        compare_runs,
        create_project,
        evaluate_model,
        find_tasks,
        list_runs,
        predict_file,
        serve_model,
        start_ray,
    )
    from apprentice.python_api.interactive_recipe import InteractiveRecipe as Recipe
    from apprentice.python_api.interactive_run import InteractiveRun as Run
    from apprentice.python_api.training_process import TrainingProcess
    from apprentice.ray_cluster.session import ray_session
    from apprentice.tasks.schema import Example, Task

__version__ = "0.1.0"

# Public name → the module that has it, and its name there where that is another.
_PLACES = {
    "Recipe": "python_api.interactive_recipe:InteractiveRecipe",
    "Run": "python_api.interactive_run:InteractiveRun",
    "TrainingProcess": "python_api.training_process",
    "CheckResult": "python_api.check_result",
    "EvaluationReport": "python_api.evaluation_report",
    "EndpointClient": "python_api.endpoint_client",
    "compare_runs": "python_api.functions",
    "create_project": "python_api.functions",
    "evaluate_model": "python_api.functions",
    "find_tasks": "python_api.functions",
    "list_runs": "python_api.functions",
    "predict_file": "python_api.functions",
    "serve_model": "python_api.functions",
    "start_ray": "python_api.functions",
    "Task": "tasks.schema",
    "Example": "tasks.schema",
    "ray_session": "ray_cluster.session",
    "print_progress": "console",
}

__all__ = [
    "ApprenticeError",
    "CheckResult",
    "ContractError",
    "DataError",
    "EndpointClient",
    "EvaluationError",
    "EvaluationReport",
    "Example",
    "ModelError",
    "Recipe",
    "RecipeError",
    "ResourcesError",
    "RowError",
    "Run",
    "RunError",
    "ServingError",
    "StorageError",
    "Task",
    "TaskError",
    "TrainingError",
    "TrainingProcess",
    "__version__",
    "compare_runs",
    "create_project",
    "evaluate_model",
    "find_tasks",
    "list_runs",
    "predict_file",
    "print_progress",
    "ray_session",
    "serve_model",
    "start_ray",
]


def __getattr__(name: str) -> Any:
    """A public name, imported from its module on first use. Raises `AttributeError` for any other name."""
    if name not in __all__:
        raise AttributeError(f"module 'apprentice' has no attribute {name!r}")
    module, _, own = _PLACES.get(name, "errors").partition(":")
    value = getattr(importlib.import_module(f"apprentice.{module}"), own or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for completion."""
    return __all__
