"""The HTTP endpoint of a run or a model, and one request to it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apprentice.data.encoding.prompt_contract import layout_of, make_contract
from apprentice.errors import ContractError, RunError, ServingError, TaskError
from apprentice.pipeline.evaluate import check_gate
from apprentice.pipeline.prepare import Progress
from apprentice.pretrained.hub import local_folder
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.ray_cluster.session import ray_session
from apprentice.recipe import Recipe, Serving, find_recipe, load_recipe
from apprentice.run.contract import PromptContract, read_contract
from apprentice.run.folder import find_run
from apprentice.storage import Folder
from apprentice.tasks.registry import Find, find_tasks
from apprentice.tasks.schema import Task

if TYPE_CHECKING:
    from apprentice.serve.replica import ModelSpec


@contextmanager
def run_endpoint(
    target: str,
    *,
    host: str | None = None,
    port: int | None = None,
    engine: str | None = None,
    contract: str | None = None,
    recipe: str | None = None,
    adapters: str | None = None,
    beside: Sequence[str] | None = None,
    threads: int | None = None,
    storage: str = "./runs",
    require_gate: bool = False,
    insecure: bool = False,
    trust: bool = False,
    progress: Progress,
) -> Iterator[str]:
    """Starts the endpoint of a run or a model, yields its URL and shuts it down on leaving.

    `adapters` is a folder of LoRA adapters to serve too; `beside` names further runs and models. `contract` (a run or model
    folder) or `recipe` gives a bare model its prompt format. Of `host`, `port`, `engine`, `adapters`, `beside` and `threads`,
    None leaves the recipe's setting. `trust` lets the folder of each model bring pickled weights or code of its own. Raises
    `RunError` for a run without a trained model, and with `require_gate` `EvaluationError` for a model that has not passed its
    quality gate.
    """
    from apprentice.serve import deployment

    run = find_run(target, storage)
    if run is not None and not run.is_trained:
        raise RunError(f"run {run.name!r} has no trained model yet; train it first.")
    folder = local_folder(str(run.model) if run is not None else target, trust=trust)
    if require_gate:
        check_gate(run.model if run is not None else Folder.at(folder))
    settings = run.recipe().serving if run is not None else _serving_for_bare(recipe, contract, storage)
    chosen = {
        "host": host,
        "port": port,
        "engine": engine,
        "threads": threads,
        "adapters": adapters and str(Folder.at(adapters)),
        "beside": tuple(beside or ()) or None,
    }
    settings = settings.model_copy(update={key: value for key, value in chosen.items() if value is not None})
    words = None if run is not None else find_contract(folder, contract, recipe, storage) or _contract_of_adapter(folder, settings)
    spoken = run.recipe() if run is not None else load_recipe(find_recipe(recipe)) if recipe is not None else None
    tasks = find_own_tasks(spoken, progress, run.tasks().find if run is not None else find_tasks) if spoken is not None else []
    name = run.name if run is not None else folder.name
    others = [_model_spec(other, storage, words or read_contract(folder), trust=trust) for other in settings.beside]
    models: dict[str, Any] = {"beside": others, "trust": trust, "insecure": insecure}
    deployment.check(folder, settings, words, name=name, **models)
    with ray_session(niceness=0):  # Ray's default, 15, starves the endpoint beside any other work on the machine
        progress("serve", {"message": f"loading {folder}"})
        models |= {"is_checked": True, "gpus": spoken.training.resources.gpus if spoken is not None else 0.0}
        models["tell"] = lambda message: progress("serve", {"message": message})
        running = deployment.start(folder, settings, model_name=name, contract=words, tasks=tasks, **models)
        try:
            yield running.url
        finally:
            running.stop()


def _model_spec(target: str, storage: str, words: PromptContract | None, *, trust: bool) -> ModelSpec:
    """A further model to serve; `words` is the prompt contract that a bare one takes."""
    from apprentice.serve.replica import ModelSpec

    run = find_run(target, storage)
    if run is not None and not run.is_trained:
        raise RunError(f"run {run.name!r}, which serving.beside names, has no trained model yet; train it first.")
    folder = local_folder(str(run.model) if run is not None else target, trust=trust)
    return ModelSpec(run.name if run is not None else Path(target).name, folder, words, trust)


def _contract_of_adapter(folder: Path, settings: Serving) -> PromptContract | None:
    """Prompt contract for a bare base without one: that of the first of its adapters that has one."""
    if settings.adapters is None or read_contract(folder) is not None:
        return None
    from apprentice.serve.generation.adapters import list_adapters

    contracts = (read_contract(place.folder) for place in list_adapters(Folder.at(settings.adapters)).values())
    return next((contract for contract in contracts if contract is not None), None)


def find_own_tasks(recipe: Recipe, progress: Progress, find: Find = find_tasks) -> list[Task]:
    """The tasks in the recipe's own files, to be offered by their fields; a file that no longer loads is reported and skipped."""
    tasks: list[Task] = []
    for entry in recipe.data.entries:
        if isinstance(entry, str) and entry.endswith((".yaml", ".yml")):
            try:
                tasks += find(entry, Path.cwd())
            except TaskError as error:
                progress("serve", {"message": f"not under /v1/tasks: {error}"})
    return tasks


def _serving_for_bare(recipe: str | None, contract: str | None, storage: str) -> Serving:
    """Serving settings for a bare model: those of the named recipe, of the contract's run, or the defaults."""
    if recipe is not None:
        return load_recipe(find_recipe(recipe)).serving
    run = find_run(contract, storage) if contract is not None else None
    return run.recipe().serving if run is not None else Serving()


def find_contract(folder: Path, contract: str | None, recipe: str | None, storage: str) -> PromptContract | None:
    """The prompt contract for a bare model: that of another run or folder, or one made from a recipe; None if neither is named.

    Raises `ContractError` if `contract` names nothing that has one.
    """
    if contract is not None:
        run = find_run(contract, storage)
        named = read_contract(run.model if run is not None else Path(contract))
        if named is None:
            raise ContractError(
                f"{contract!r} is not a run or folder with a prompt contract (apprentice.json); name a trained run."
            )
        return named
    if recipe is not None:
        settings = load_recipe(find_recipe(recipe))
        return make_contract(settings, layout_of(settings, Tokenizer(folder)), folder)
    return None


def wait_for_stop() -> None:
    """Blocks until Ctrl-C or SIGTERM."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()


def ask_endpoint(url: str, instruction: str, input: str, *, max_tokens: int, key: str | None = None) -> str:
    """Sends one instruction to a running endpoint, which phrases it as in training; returns the reply.

    Raises `ServingError` if no endpoint answers, or it answers with an error.
    """
    import httpx

    body = {"instruction": instruction, "input": input, "max_tokens": max_tokens}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        reply = httpx.post(f"{url.rstrip('/')}/v1/instruct", json=body, headers=headers, timeout=300.0)
    except httpx.HTTPError as error:
        raise ServingError(
            f"no endpoint answers at {url} ({error.__class__.__name__}); start one with `apprentice serve RUN`."
        ) from error
    if reply.status_code != 200:
        raise ServingError(f"{url} answered {reply.status_code}: {reply.text[:300]}")
    return str(reply.json()["choices"][0]["text"])
