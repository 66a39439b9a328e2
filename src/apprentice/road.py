"""The road: prepare, train, evaluate and serve, one after the other. The only place that knows all the stages.

Each stage checks what can be known before it writes or reserves anything, and goes on where an earlier attempt stopped.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apprentice import check
from apprentice.artifacts import PromptContract, Run, find_run, open_run, read_contract
from apprentice.data.contract import layout_of, make_contract
from apprentice.data.pipeline import Corpus, estimate_steps, make_corpus
from apprentice.errors import ApprenticeError, ContractError, RecipeError, RunError, ServingError
from apprentice.hub import local_folder
from apprentice.recipe import Recipe, Serving, find_recipe, load_recipe
from apprentice.session import ray_session
from apprentice.storage import Folder
from apprentice.tokenizer import Tokenizer

Progress = Callable[[str, Mapping[str, Any]], None]


def prepare(recipe: Recipe, *, restart: bool = False, progress: Progress) -> dict[str, Any]:
    """Freezes each task's index; gives the run folder and what training will see."""
    with ray_session():
        run, corpus = _prepared(recipe, restart=restart, progress=progress)
        rows = {name: len(index.train) for name, index in corpus.indices.items() if name not in corpus.held_out}
        return {"run": str(run.folder), "tasks": len(rows), "train_rows": sum(rows.values()), **estimate_steps(corpus)}


def train(recipe: Recipe, *, restart: bool = False, progress: Progress) -> dict[str, Any]:
    """Fine-tunes, or goes on with a run that was stopped; gives the run folder and the last figures."""
    from apprentice.train import launch

    with ray_session():
        run, corpus = _prepared(recipe, restart=restart, progress=progress)
        if run.is_trained:
            return {"run": str(run.folder), "already": True, **run.status()}
        result = launch.train(recipe, run, corpus, progress=lambda values: progress("train", _step_line(values)))
        run.update_status(state="trained")
        return {"run": str(run.folder), "already": False, **asdict(result)}


def _step_line(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a person wants to see of one record of the training loop."""
    if "validation_loss" in values:
        return {"step": f"{values['step']}/{values['steps']}", "validation_loss": values["validation_loss"], "done": True}
    return {
        "step": f"{values['step']}/{values['steps']}",
        "loss": values["loss"],
        "learning_rate": values["learning_rate"],
        "tokens_per_s": values["tokens_per_s"],
        "waiting_for_data_share": values["data_wait"],
        "eta_s": values["eta_s"],
        "restarts": values["attempt"] - 1 or None,
        "done": values["step"] == values["steps"],
    }


def training_sentence(result: Mapping[str, Any]) -> str:
    """One line on what `train` did."""
    if result["already"]:
        return "this run is trained already; --restart trains it anew"
    return (
        f"{result['steps']} steps, loss {result['loss']:.3f}, validation loss {number(result['validation_loss'])},"
        f" {result['tokens_per_s']:.0f} tokens/s, waited for data {result['wait_share']:.1%} of the time"
    )


def number(value: float | None) -> str:
    """A loss for the screen; `none` where there were no rows to take it from."""
    return "none" if value is None else f"{value:.3f}"


def _prepared(recipe: Recipe, *, restart: bool, progress: Progress) -> tuple[Run, Corpus]:
    check.before_writing(recipe)
    progress("prepare", {"message": f"tasks of {recipe.name}"})
    run = open_run(recipe, restart=restart)
    try:
        corpus = make_corpus(recipe, run)
        check.after_indexing(recipe, corpus)
    except ApprenticeError:
        if not run.status():  # nothing was trained here yet: leave no half-made run behind
            run.folder.delete()
        raise
    progress(
        "prepare", {"tasks": len(corpus.tasks), "rows": sum(len(index.train) for index in corpus.indices.values()), "done": True}
    )
    return run, corpus


def check_recipe(recipe: Recipe) -> list[check.Finding]:
    """Every point that can be known beforehand."""
    with ray_session():
        return check.check(recipe)


def preview(recipe: Recipe, number: int) -> list[Any]:
    """The first `number` examples of the plan, as the model will see them (`apprentice.data.preview`)."""
    from apprentice.data import preview as view

    with ray_session(), _scratch_run(recipe) as run:
        return view.preview(make_corpus(recipe, run), number)


@contextmanager
def _scratch_run(recipe: Recipe) -> Iterator[Run]:
    """A run folder that is thrown away: looking must not leave a half-made run behind."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="apprentice-") as folder:
        yield Run(Folder.at(folder) / recipe.name)


def runs(storage: str) -> list[dict[str, Any]]:
    """Every run in `storage` with its state."""
    found = [Run(folder) for folder in Folder.at(storage).children() if (folder / "identity.json").exists()]
    return [{"name": run.name, "state": "prepared"} | run.status() for run in found]


def evaluate_run(recipe: Recipe, *, progress: Progress) -> tuple[dict[str, Any], Path]:
    """Scores the run of `recipe` beside its base model; gives the report and its folder, which lies in the run."""
    from apprentice.evaluate import launch

    run = Run(Folder.at(recipe.storage) / recipe.name)
    if not run.is_trained:
        raise RunError(f"run {run.name!r} in {recipe.storage} has no trained model yet; train it first.")
    base_shots = recipe.evaluation.shots if recipe.evaluation.baseline_shots is None else recipe.evaluation.baseline_shots
    subjects = [launch.Subject("tuned", run.model.local, recipe.evaluation.shots)]
    if base_shots:
        subjects.insert(0, launch.Subject("base", local_folder(recipe.model.base), base_shots))
    with ray_session():
        corpus = make_corpus(recipe, run)
        folder = run.report.local
        report = launch.evaluate(recipe, corpus, subjects, folder, run=run, progress=lambda values: progress("evaluate", values))
    run.update_status(score=report["summary"]["score"])
    return report, folder


def evaluate_model(model: str, recipe: Recipe, out: Path | None, *, progress: Progress) -> tuple[dict[str, Any], Path]:
    """Scores a bare model (folder, hub id) on the tasks of `recipe`, spoken to in the recipe's layout."""
    from apprentice.evaluate import launch

    folder = local_folder(model)
    place = out or Path("reports") / folder.name
    subjects = [launch.Subject("model", folder, recipe.evaluation.shots)]
    with ray_session(), _scratch_run(recipe) as scratch:
        corpus = make_corpus(recipe, scratch)
        return launch.evaluate(recipe, corpus, subjects, place, progress=lambda values: progress("evaluate", values)), place


def evaluate(
    target: str, overrides: Sequence[str], *, recipe: str | None, out: Path | None, storage: str, progress: Progress
) -> tuple[dict[str, Any], Path]:
    """Scores what `target` names: a recipe, a run (beside its base model), or a bare model on the tasks of `recipe`."""
    run = find_run(target, storage)
    if run is not None:
        return evaluate_run(load_recipe(run.recipe_file.local, overrides), progress=progress)
    if target.endswith((".yaml", ".yml")) or _is_shipped(target):
        return evaluate_run(load_recipe(find_recipe(target), overrides), progress=progress)
    if recipe is None:
        raise RecipeError(f"{target!r} is not a run or a recipe; a bare model needs the tasks of a recipe: --recipe FILE.")
    return evaluate_model(target, load_recipe(find_recipe(recipe), overrides), out, progress=progress)


def _is_shipped(name: str) -> bool:
    try:
        find_recipe(name)
    except RecipeError:
        return False
    return True


@contextmanager
def endpoint(
    target: str,
    *,
    host: str | None = None,
    port: int | None = None,
    contract: str | None = None,
    recipe: str | None = None,
    storage: str = "./runs",
    progress: Progress,
) -> Iterator[str]:
    """The running endpoint's URL for a run or a model; it is shut down on leaving."""
    from apprentice.serve import deployment

    run = find_run(target, storage)
    if run is not None and not run.is_trained:
        raise RunError(f"run {run.name!r} has no trained model yet; train it first.")
    folder = run.model.local if run is not None else local_folder(target)
    settings = run.recipe().serving if run is not None else _serving_for_bare(recipe, contract, storage)
    settings = settings.model_copy(update={k: v for k, v in (("host", host), ("port", port)) if v is not None})
    words = None if run is not None else _contract_for(folder, contract, recipe, storage)
    deployment.check(folder, settings, words)
    with ray_session():
        progress("serve", {"message": f"loading {folder}"})
        running = deployment.start(folder, settings, model_name=run.name if run is not None else folder.name, contract=words)
        try:
            yield running.url
        finally:
            running.stop()


def _serving_for_bare(recipe: str | None, contract: str | None, storage: str) -> Serving:
    """How a bare model is served: as the named recipe or the contract's run says, or by default."""
    if recipe is not None:
        return load_recipe(find_recipe(recipe)).serving
    run = find_run(contract, storage) if contract is not None else None
    return run.recipe().serving if run is not None else Serving()


def _contract_for(folder: Path, contract: str | None, recipe: str | None, storage: str) -> PromptContract | None:
    """The contract that a bare model is given: of another run, or made from a recipe; None if nothing is named."""
    if contract is not None:
        run = find_run(contract, storage)
        found = read_contract(run.model.local if run is not None else Path(contract))
        if found is None:
            raise ContractError(
                f"{contract!r} is not a run or folder with a prompt contract (apprentice.json); name a trained run."
            )
        return found
    if recipe is not None:
        settings = load_recipe(find_recipe(recipe))
        return make_contract(settings, layout_of(settings, Tokenizer(folder)), folder)
    return None


def wait_for_stop() -> None:
    """Returns at Ctrl-C or SIGTERM."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()


def ask(url: str, instruction: str, input: str, *, max_tokens: int) -> str:
    """The reply of a running endpoint to one instruction, phrased there as in training. Raises `ServingError`."""
    import httpx

    body = {"instruction": instruction, "input": input, "max_tokens": max_tokens}
    try:
        reply = httpx.post(f"{url.rstrip('/')}/v1/instruct", json=body, timeout=300.0)
    except httpx.HTTPError as error:
        raise ServingError(
            f"no endpoint answers at {url} ({error.__class__.__name__}); start one with `apprentice serve RUN`."
        ) from error
    if reply.status_code != 200:
        raise ServingError(f"{url} answered {reply.status_code}: {reply.text[:300]}")
    return str(reply.json()["choices"][0]["text"])
