"""Functions on models that are no runs, on several runs, and on a storage."""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from apprentice import pipeline
from apprentice.console import ignore_progress
from apprentice.pipeline import Progress
from apprentice.python_api.endpoint_client import EndpointClient, open_endpoint
from apprentice.python_api.evaluation_report import EvaluationReport
from apprentice.python_api.interactive_recipe import InteractiveRecipe
from apprentice.python_api.interactive_run import InteractiveRun
from apprentice.storage import Folder
from apprentice.tasks import registry
from apprentice.tasks.schema import Task

_OPEN = ExitStack()  # what lives as long as this process
atexit.register(_OPEN.close)


def create_project(
    file: str | Path,
    out: str | Path | None = None,
    *,
    instruction: str | None = None,
    inputs: Sequence[str] = (),
    answer: str | None = None,
    label: str | None = None,
    choices: Sequence[str] = (),
    encoding: str | None = None,
    test: str | Path | None = None,
    base: str = "smollm2-135m-instruct",
) -> InteractiveRecipe:
    """Writes a task file and a recipe for a table into the new folder `out`, as `apprentice init` does, and returns the recipe.

    `instruction`, `inputs`, `answer` and `label` name columns, `choices` the labels or the columns with each row's choices; what is
    left out is guessed. Raises `DataError` for a table that cannot be read, `TaskError` for columns that are not clear.
    """
    table = pipeline.TableDescription(instruction, tuple(inputs), answer, label, tuple(choices), encoding)
    folder, tested = Path(out) if out else None, Path(test) if test else None
    return InteractiveRecipe.load(pipeline.create_project(Path(file), folder, table, test=tested, base=base)["recipe"])


def find_tasks(name: str | Mapping[str, Any], folder: str | Path = ".") -> list[Task]:
    """The tasks that an entry of `data.tasks` names: a task or cluster of the library, task files (path or glob), or a collection.

    Paths are relative to `folder`. Raises `TaskError` if there are none, or one is wrong.
    """
    return registry.find_tasks(name, Path(folder))


def list_runs(storage: str = "./runs") -> list[InteractiveRun]:
    """All runs in `storage`, by name; `status()` tells how each stands."""
    return [InteractiveRun(Folder.at(storage) / listed["name"]) for listed in pipeline.list_runs(storage)]


def start_ray() -> None:
    """Connects this process to Ray until it ends, so that the stages that follow need not start one each.

    That is the cluster that `RAY_ADDRESS` names, or a local Ray. Raises `ResourcesError` where Ray does not start.
    """
    from apprentice.ray_cluster.session import ray_session

    _OPEN.enter_context(ray_session())


def compare_runs(
    runs: Sequence[InteractiveRun | str | Path], out: str | Path | None = None, *, storage: str = "./runs"
) -> EvaluationReport:
    """One report over several evaluated runs, each compared with the first, question by question, as `apprentice compare` does.

    A run is an object, a name in `storage` or a folder. The report goes to `out`, by default `reports/compare-<names>`. Raises
    `EvaluationError` for a run without predictions.
    """
    targets = [str(run.folder) if isinstance(run, InteractiveRun) else str(run) for run in runs]
    report, folder = pipeline.compare_runs(targets, Path(out) if out else None, storage)
    return EvaluationReport.from_json(report, folder)


def evaluate_model(
    model: str | Path,
    *overrides: str,
    recipe: str | Path | None = None,
    tasks: Iterable[str] = (),
    against: str | None = None,
    endpoint: str | None = None,
    out: str | Path | None = None,
    restart: bool = False,
    storage: str = "./runs",
    progress: Progress | None = None,
) -> EvaluationReport:
    """Scores a bare model or an adapter (folder or hub id) on the tasks of `recipe`, or on `tasks`, as `apprentice evaluate` does.

    With `endpoint`, the model's tokenizer counts and the endpoint at this address answers. Raises `RecipeError` without `recipe`
    and `tasks`, `ModelError` for a model that is not there, and `EvaluationError` where nothing can be scored.
    """
    options = pipeline.EvaluationOptions(
        recipe=str(recipe) if recipe else None,
        tasks=tuple(tasks),
        against=against,
        endpoint=endpoint,
        out=Path(out) if out else None,
        restart=restart,
        storage=storage,
    )
    report, folder = pipeline.evaluate_target(str(model), overrides, options=options, progress=progress or ignore_progress)
    return EvaluationReport.from_json(report, folder)


def predict_file(
    target: str | Path,
    file: str | Path,
    out: str | Path | None = None,
    *,
    max_tokens: int = 128,
    contract: str | None = None,
    recipe: str | None = None,
    restart: bool = False,
    storage: str = "./runs",
    trust: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the replies of a run or a model to every row of `file`, as `apprentice predict` does.

    Returns `out` (the folder with the Parquet parts: `row`, `reply`, …), `rows`, `parts` and `bad_rows`, the number of rows without
    a reply, which `bad_rows.jsonl` lists. `contract` (a run or model folder) or `recipe` gives a bare model its prompt format.
    Raises `DataError` for a file that cannot be read, and `EvaluationError` where `out` has replies to something else.
    """
    return pipeline.predict_file(
        str(target),
        str(file),
        str(out) if out else None,
        max_tokens=max_tokens,
        contract=contract,
        recipe=recipe,
        restart=restart,
        storage=storage,
        trust=trust,
        progress=progress or ignore_progress,
    )


def serve_model(
    target: str | Path, *, port: int = 0, progress: Progress | None = None, **options: Any
) -> AbstractContextManager[EndpointClient]:
    """Serves a run or a model for a `with` block, which gets a client; port 0 takes a free one.

    `options` are `host`, `engine`, `contract`, `recipe`, `adapters`, `beside`, `threads`, `storage`, `require_gate`, `insecure` and
    `trust`, as of `apprentice serve`. Raises `RunError` for a run without a trained model, `ContractError` for a model without a
    prompt format, and `ServingError` where the endpoint cannot start.
    """
    return open_endpoint(str(target), port=port, progress=progress, **options)
