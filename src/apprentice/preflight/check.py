"""Preflight checks: everything that can be known before hardware is reserved, each check with one sentence.

`check` runs all of them and lists their findings; `check_before_writing` and `check_index` raise the first that fails, so that a
stage stops before it has written or reserved anything.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from apprentice.data.sources.cache import cache_cleared
from apprentice.data.stream import Corpus, estimate_steps, make_corpus
from apprentice.errors import ApprenticeError, DataError, RecipeError
from apprentice.preflight import cluster_checks, data_checks, model_checks
from apprentice.preflight.lookup import RecipeLookup
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder

Check = Callable[[RecipeLookup], str]  # returns one sentence; raises the `ApprenticeError` that the user can correct

# In the order in which a person would correct what they find.
CHECKS_WITHOUT_RAY: dict[str, Check] = {
    "tasks": data_checks.check_tasks,
    "downloads": data_checks.list_downloads,
    "model": model_checks.check_model,
    "sources": data_checks.check_sources,
}
CHECKS_WITH_RAY: dict[str, Check] = {"storage": cluster_checks.check_storage, "resources": cluster_checks.check_workers}


@dataclass(frozen=True)
class Finding:
    """The result of one check: its subject, whether it passed, and one sentence."""

    subject: str
    ok: bool
    message: str

    def as_dict(self) -> dict[str, Any]:
        """The finding as an object of `apprentice check --json`."""
        return asdict(self)


def check(recipe: Recipe, connected: Callable[[], AbstractContextManager[None]], *, fast: bool = False) -> Iterator[Finding]:
    """Yields the findings of all checks, in the order in which a person would correct them, and leaves no files behind.

    Checks that need Ray run only after all others passed, inside `connected()`; a dry run of the data and the model comes
    last. With `fast` those before it are all.
    """
    lookup = RecipeLookup(recipe)
    with cache_cleared(recipe):
        if not (yield from _find(CHECKS_WITHOUT_RAY, lookup)) or fast:
            return
        with connected():
            if (yield from _find(CHECKS_WITH_RAY, lookup)):
                with tempfile.TemporaryDirectory(prefix="apprentice-") as folder:
                    yield from _dry_run(recipe, Run(Folder.at(folder) / recipe.name))


def run_check(subject: str, recipe: Recipe) -> str:
    """The sentence of one check. Raises the `ApprenticeError` that it finds."""
    return (CHECKS_WITHOUT_RAY | CHECKS_WITH_RAY)[subject](RecipeLookup(recipe))


def check_before_writing(recipe: Recipe, connect: Callable[[], None]) -> None:
    """Runs all checks but the dry run; raises the first failure. `connect()` is called before those that need Ray."""
    lookup = RecipeLookup(recipe)
    with cache_cleared(recipe, keep=True):
        for check_subject in CHECKS_WITHOUT_RAY.values():
            check_subject(lookup)
        connect()
        for check_subject in CHECKS_WITH_RAY.values():
            check_subject(lookup)


def check_index(recipe: Recipe, corpus: Corpus) -> str:
    """Checks what only the frozen index can tell: the number of steps, the warm-up, and each task's training rows.

    Returns one sentence. Raises `RecipeError` if the warm-up is not shorter than the run, `DataError` for a task without rows.
    """
    steps = int(estimate_steps(corpus)["steps"])
    warmup = recipe.training.optimizer.warmup_steps
    if warmup >= steps:
        raise RecipeError(
            f"training.optimizer.warmup_steps {warmup} is not shorter than the run, which has {steps} steps; lower it."
        )
    empty = [name for name, index in corpus.indices.items() if name not in corpus.held_out and not len(index.train)]
    if empty:
        raise DataError(f"task {empty[0]!r} has no usable training row; hold it out or leave it out of data.tasks.")
    return f"{steps} steps of {recipe.training.global_batch} rows of {corpus.row_length} tokens"


def _find(checks: Mapping[str, Check], lookup: RecipeLookup) -> Generator[Finding, None, bool]:
    """Yields the findings of `checks`, a failure that several share, such as a missing task file, once; returns if all passed."""
    failures: set[str] = set()
    for subject, check_subject in checks.items():
        finding = _finding(subject, check_subject, lookup)
        if finding.ok or finding.message not in failures:
            yield finding
        if not finding.ok:
            failures.add(finding.message)
    return not failures


def _finding(subject: str, check_subject: Callable[..., str], *arguments: Any) -> Finding:
    try:
        return Finding(subject, True, check_subject(*arguments))
    except ApprenticeError as error:
        return Finding(subject, False, str(error))


def _dry_run(recipe: Recipe, scratch: Run) -> Iterator[Finding]:
    """Findings from a dry run: the frozen index, a first window of rows and one pass of the model."""
    from apprentice.preflight import dry_run  # these import PyTorch
    from apprentice.preflight.evaluation_estimate import describe_evaluation

    try:
        corpus = make_corpus(recipe, scratch)
        rows = dry_run.render_first_rows(corpus)
    except ApprenticeError as error:
        yield Finding("training", False, str(error))
        return
    findings = [_finding("training", check_index, recipe, corpus)]
    yield findings[-1]
    base = dry_run.DryRunModel(recipe)
    about_rows: dict[str, tuple[Any, ...]] = {"rows": (dry_run.describe_rows,), "packing": (dry_run.compare_packing, base)}
    if recipe.training.aim.rounds:
        about_rows = {"rows": (dry_run.describe_prompts,)}
    for subject, (describe, *more) in about_rows.items():
        findings.append(_finding(subject, describe, corpus, rows, *more))
        yield findings[-1]
    if all(finding.ok for finding in findings):
        speed = dry_run.measure_speed(corpus, rows, base)
        yield _finding("duration", dry_run.describe_duration, corpus, speed)
        yield _finding("evaluation", describe_evaluation, corpus, speed.reading_per_cpu)
