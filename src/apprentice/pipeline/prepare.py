"""Preparation of a run: preflight checks, the frozen index, and previews and traces of its examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from apprentice.data.sources.cache import cache_cleared
from apprentice.data.stream import Corpus, estimate_steps, make_corpus
from apprentice.errors import ApprenticeError, RunError
from apprentice.preflight import check
from apprentice.ray_cluster.session import quiet, ray_session
from apprentice.recipe import Recipe
from apprentice.run.fence import lease_run
from apprentice.run.folder import Run, find_run, open_run
from apprentice.run.json_lines import read_records
from apprentice.storage import Folder

Progress = Callable[[str, Mapping[str, Any]], None]  # called with the name of a stage and values to show


def prepare_run(recipe: Recipe, *, restart: bool = False, progress: Progress) -> dict[str, Any]:
    """Freezes each task's index; returns the run folder, the numbers of tasks and training rows, and estimated steps."""
    with open_for_writing(recipe, "prepare", restart=restart, progress=progress) as (run, corpus):
        rows = {name: len(index.train) for name, index in corpus.indices.items() if name not in corpus.held_out}
        return {"run": str(run.folder), "tasks": len(rows), "train_rows": sum(rows.values()), **estimate_steps(corpus)}


@contextmanager
def open_for_writing(recipe: Recipe, command: str, *, restart: bool, progress: Progress) -> Iterator[tuple[Run, Corpus]]:
    """Prepares the run of `recipe` and yields it with its corpus; until the block ends, Ray is connected and the run leased.

    `command` names the holder to others. Raises `FencedError` if another process holds the run, and what the preflight checks
    raise; Ray is started only after those that can do without it have passed.
    """
    folder = Folder.at(recipe.storage) / recipe.name
    quiet()  # checks may download a model
    with ExitStack() as stack:
        check.check_before_writing(recipe, connect=lambda: stack.enter_context(ray_session()))
        lease = lease_run(folder, command, tell=lambda message: progress("prepare", {"message": message, "done": True}))
        stack.enter_context(lease)
        yield prepare_corpus(recipe, restart=restart, progress=progress)


def prepare_corpus(recipe: Recipe, *, restart: bool, progress: Progress) -> tuple[Run, Corpus]:
    """Opens the run of `recipe` and builds its indices; a run that this call made is removed again where that fails."""
    progress("prepare", {"message": f"tasks of {recipe.name}"})
    existed = (Folder.at(recipe.storage) / recipe.name / "identity.json").exists() and not restart
    run = open_run(recipe, restart=restart)
    try:
        corpus = make_corpus(recipe, run)
        check.check_index(recipe, corpus)
    except ApprenticeError:
        if not existed:  # this call made the run: leave no half-made one behind
            run.folder.delete()
        raise
    progress(
        "prepare", {"tasks": len(corpus.tasks), "rows": sum(len(index.train) for index in corpus.indices.values()), "done": True}
    )
    return run, corpus


def check_recipe(recipe: Recipe, *, fast: bool = False) -> Iterator[check.Finding]:
    """The findings of all preflight checks, one by one (`apprentice.preflight.check`)."""
    return check.check(recipe, ray_session, fast=fast)


def examine_machine(storage: str) -> Iterator[Any]:
    """The diagnoses of this machine, one by one (`apprentice.preflight.doctor`)."""
    from apprentice.preflight.doctor import examine  # imports PyTorch

    quiet()
    return examine(storage, ray_session)


def estimate_on_hardware(recipe: Recipe, hardware: str) -> Any:
    """The estimate of a recipe on hardware that is not here (`apprentice.preflight.hardware.hardware_report`)."""
    from apprentice.preflight.hardware.hardware_report import report_on_hardware  # imports PyTorch

    return report_on_hardware(recipe, hardware)


def preview_examples(recipe: Recipe, number: int) -> list[Any]:
    """The first `number` examples of the sampling plan, as the model will see them (`apprentice.data.inspect.preview`)."""
    from apprentice.data.inspect import preview as view

    with ray_session(), temporary_run(recipe) as run:
        return view.preview(make_corpus(recipe, run), number)


def preview_html(recipe: Recipe, rows: int) -> str:
    """The first `rows` packed rows as an HTML page (`apprentice.data.inspect.packed_rows_html`)."""
    from apprentice.data.inspect import packed_rows_html as row_view

    with ray_session(), temporary_run(recipe) as run:
        return row_view.to_html(row_view.rows_of(make_corpus(recipe, run), rows))


def packed_window(recipe: Recipe, window: int) -> Mapping[str, Any]:
    """The arrays of one window of packed rows, as training gets them (`apprentice.data.window`)."""
    from apprentice.data.window import WindowRenderer

    with ray_session(), temporary_run(recipe) as run:
        return WindowRenderer(make_corpus(recipe, run)).window(window)


def trace_examples(name: str, storage: str, *, step: int | None, position: int | None) -> list[Any]:
    """The examples of one optimizer step of a run, or the example at one position of its sampling plan.

    Raises `RunError` if there is no such run or step.
    """
    from apprentice.data.inspect import preview as view

    run = find_run(name, storage)
    if run is None:
        raise RunError(f"{name!r} is not a run in {storage}; `apprentice runs` lists them.")
    positions = [position] if position is not None else _positions(run, step or 0)
    return view.trace(make_corpus(run.recipe(), run, parallel=False), positions)


def _positions(run: Run, step: int) -> list[int]:
    """Plan positions of an optimizer step's examples; of a step that was repeated after a fault, those of the last time."""
    records = read_records(run.folder / "steps.jsonl")
    made = {record["step"]: record["examples"] for record in records if "examples" in record}
    if step not in made:
        raise RunError(f"run {run.name!r} has made {max(made, default=0)} steps, counted from 1; step {step} is not among them.")
    return [int(position) for position in made[step]]


@contextmanager
def temporary_run(recipe: Recipe, *, keep_cache: bool = False) -> Iterator[Run]:
    """Yields a run in a temporary folder, so that a preview leaves no half-made run behind.

    With `keep_cache` the files that were converted for it stay in the storage, for the next command that reads them.
    """
    import tempfile

    with cache_cleared(recipe, keep=keep_cache), tempfile.TemporaryDirectory(prefix="apprentice-") as folder:
        yield Run(Folder.at(folder) / recipe.name)
