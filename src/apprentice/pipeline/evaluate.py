"""Evaluation of a run, a bare model, an adapter or an HTTP endpoint; reports made again and compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from apprentice.data.stream import make_corpus
from apprentice.errors import EvaluationError, RecipeError, RunError, TaskError
from apprentice.pipeline.prepare import Progress, temporary_run
from apprentice.pretrained.hub import local_folder
from apprentice.ray_cluster.session import ray_session
from apprentice.recipe import RUN, Recipe, find_recipe, load_recipe
from apprentice.run.contract import read_contract
from apprentice.run.fence import wait_until_free
from apprentice.run.folder import Run, find_run
from apprentice.run.identity import ADAPTER_CONFIG, GATE_FILE
from apprentice.storage import Folder, refuse_credentials
from apprentice.tasks.registry import Find, find_tasks, select_tasks

if TYPE_CHECKING:
    from apprentice.evaluate.run import Subject
    from apprentice.evaluate.scoring.endpoint import EndpointAddress

Result = tuple[dict[str, Any], Folder]  # the contents of report.json, and the folder that it was written to


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of `apprentice evaluate`, besides its target and overrides."""

    recipe: str | None = None
    tasks: tuple[str, ...] = ()
    against: str | None = None
    endpoint: str | None = None
    model: str | None = None  # the model's name at the endpoint
    key: str | None = None  # the endpoint's API key
    out: Path | None = None
    restart: bool = False
    storage: str = "./runs"


def evaluate_run(
    recipe: Recipe, *, options: EvaluationOptions = EvaluationOptions(), trained_by: Recipe | None = None, progress: Progress
) -> Result:
    """Evaluates the run of `recipe` beside its base model, or beside `options.against`.

    Returns the report and its folder, which lies in the run unless `options.out` names another. `trained_by` is the recipe
    whose tasks were trained on, where `recipe` has other tasks to score. Only an evaluation on the run's own tasks, without
    `against` and endpoint, stores the run's score and its quality gate's verdict. Raises `RunError` for a run without a
    trained model, and `FencedError` if another process holds the run.
    """
    run = Run(Folder.at(recipe.storage) / recipe.name)
    if not run.is_trained:
        raise RunError(f"run {run.name!r} in {recipe.storage} has no trained model yet; train it first.")
    wait_until_free(run.folder, tell=lambda message: progress("evaluate", {"message": message, "done": True}))
    endpoint = _endpoint(options)
    tuned = _subject("tuned" if endpoint is None else "endpoint", local_folder(str(run.model)), recipe.evaluation.shots, endpoint)
    place = run.report
    known: list[Folder] = []
    if options.against is not None:
        name, folder, known = _other(options, trust=recipe.model.trust)
        subjects = [_subject(name, folder, recipe.evaluation.shots), tuned]
        place = place / f"against-{name}"
        known = [*known, run.report]
    else:
        settings = recipe.evaluation
        base_shots = settings.shots if settings.baseline_shots is None else settings.baseline_shots
        subjects = [_subject("base", local_folder(recipe.model.base, trust=recipe.model.trust), base_shots)] if base_shots else []
        subjects.append(tuned)
        place = place if endpoint is None else place / "endpoint"
    if options.tasks:  # not into the run's own report, which is about the run's own tasks
        place = place / f"tasks-{'-'.join(Path(name).stem for name in options.tasks)}"[:100]
        known = [*known, run.report]
    place = Folder.at(options.out) if options.out else place
    with ray_session():
        trained = trained_clusters(trained_by or recipe, run.tasks().find)
        report = _score_subjects(recipe, run, subjects, place, run, known, options.restart, trained, progress)
    if options.against is None and endpoint is None and not options.tasks:
        run.update_status(score=report["summary"]["score"], score_metrics=list_score_metrics(report))
        _store_verdict(run.model, report)
    return report, place


def list_score_metrics(report: Mapping[str, Any]) -> list[str]:
    """Names of the metrics that a report's overall score is the mean of, the metric of most tasks first."""
    last = report["columns"][-1]["subject"]
    key = next(column["key"] for column in report["columns"] if column["subject"] == last)
    scored = [task["metric"] for task in report["tasks"] if task["columns"].get(key, {}).get("score") is not None]
    return [name for name, _ in Counter(scored).most_common()]


def evaluate_model(
    model: str,
    recipe: Recipe,
    out: Path | None,
    *,
    options: EvaluationOptions = EvaluationOptions(),
    trained_by: Recipe | None = None,
    progress: Progress,
) -> Result:
    """Evaluates a bare model or an adapter (folder, hub id) on the tasks of `recipe`, with the recipe's prompt format.

    The report goes to `out`, by default `reports/<model>`. All tasks count as held out, unless one of the evaluated models
    comes from the run of `recipe`. `trained_by` is as in `evaluate_run`.
    """
    with _merge_if_adapter(model, recipe.model.dtype, trust=recipe.model.trust) as (name, folder):
        place = Folder.at(out or Path("reports") / name)
        endpoint = _endpoint(options)
        subjects = [_subject("model" if endpoint is None else "endpoint", folder, recipe.evaluation.shots, endpoint)]
        known: list[Folder] = []
        if options.against is not None:
            other, other_folder, known = _other(options, trust=recipe.model.trust)
            subjects.insert(0, _subject(other, other_folder, recipe.evaluation.shots))
        beside_an_adapter = Path(model).expanduser().parent / "model"
        trained: frozenset[str] = frozenset()
        if any(_came_from(recipe, place) for place in (beside_an_adapter, *(subject.folder for subject in subjects))):
            trained = trained_clusters(trained_by or recipe)
        else:
            recipe = _all_held_out(recipe)
        with ray_session(), temporary_run(recipe, keep_cache=True) as scratch:
            return _score_subjects(recipe, scratch, subjects, place, None, known, options.restart, trained, progress), place


def _came_from(recipe: Recipe, model: Path) -> bool:
    """Whether the weights in `model`, or weights that they were trained from, come from the run of `recipe`."""
    contract = read_contract(model)
    return contract is not None and recipe.name in (contract.run, *(name.removeprefix(RUN) for name in contract.ancestors))


def trained_clusters(recipe: Recipe, find: Find = find_tasks) -> frozenset[str]:
    """Clusters that the run of `recipe` trains on, with those of the earlier runs it starts from, where these still exist."""
    tasks, kept_out = select_tasks(recipe.data.entries, recipe.data.hold_out, Path.cwd(), to_train=False, find=find)
    clusters = frozenset(task.cluster for task in tasks if task.name not in kept_out)
    if recipe.model.base.startswith(RUN):
        before = Run(Folder.at(recipe.model.base.removeprefix(RUN)))
        with suppress(TaskError):  # its tasks' files may be gone
            clusters |= trained_clusters(before.recipe(), before.tasks().find) if before.recipe_file.exists() else frozenset()
    return clusters


def _all_held_out(recipe: Recipe) -> Recipe:
    tasks, _ = select_tasks(recipe.data.entries, (), Path.cwd(), to_train=False)
    held_out = tuple(task.name for task in tasks)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"hold_out": held_out})})


def _score_subjects(
    recipe: Recipe,
    indexed: Run,
    subjects: Sequence[Subject],
    place: Folder,
    run: Run | None,
    known: Sequence[Folder],
    restart: bool,
    trained: frozenset[str],
    progress: Progress,
) -> dict[str, Any]:
    from apprentice.evaluate import run as launch
    from apprentice.evaluate.report.run_history import summarise_contamination

    if restart:
        for name in (launch.predictions.FILE, launch.PARTS):
            (place / name).delete()
    corpus = make_corpus(recipe, indexed, to_train=False)
    report = launch.evaluate(
        recipe,
        corpus,
        subjects,
        place,
        run=run,
        known=known,
        contamination=summarise_contamination(corpus.contamination),
        trained_clusters=trained,
        progress=lambda values: progress("evaluate", values),
    )
    return report.as_json()


def _subject(name: str, folder: Path, shots: tuple[int, ...], endpoint: EndpointAddress | None = None) -> Subject:
    from apprentice.evaluate.run import Subject

    return Subject(name, folder, shots, endpoint)


def _endpoint(options: EvaluationOptions) -> EndpointAddress | None:
    from apprentice.evaluate.scoring.endpoint import EndpointAddress, model_at

    if options.endpoint is None:
        return None
    refuse_credentials(options.endpoint)
    return EndpointAddress(options.endpoint, options.model or model_at(options.endpoint, options.key), options.key)


def _other(options: EvaluationOptions, *, trust: bool) -> tuple[str, Path, list[Folder]]:
    """Name, model folder and earlier reports of the run or model to compare with."""
    assert options.against is not None
    run = find_run(options.against, options.storage)
    if run is None:
        folder = local_folder(options.against, trust=trust)
        return folder.name, folder, []
    if not run.is_trained:
        raise RunError(f"run {run.name!r} has no trained model yet; train it first.")
    return run.name, local_folder(str(run.model)), [run.report]


@contextmanager
def _merge_if_adapter(model: str, dtype: str, *, trust: bool) -> Iterator[tuple[str, Path]]:
    """Yields a model's name and folder; an adapter (PEFT folder) is merged into its base in a temporary folder, in `dtype`."""
    folder = Path(model).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file():
        whole = local_folder(model, trust=trust)
        yield whole.name, whole
        return
    from apprentice.models.loading import resolve_dtype
    from apprentice.models.merge import merge_adapter

    with TemporaryDirectory(prefix="apprentice-") as scratch:
        yield folder.name, merge_adapter(folder, Path(scratch), resolve_dtype(dtype), trust=trust)


def _store_verdict(model: Folder, report: dict[str, Any]) -> None:
    """Writes the quality gate's verdict beside the weights that it is about, in place of an earlier one."""
    file = model / GATE_FILE
    file.delete()
    if report["gate"] is not None:
        contract = read_contract(model)
        file.write_json(
            {**report["gate"], "created": report["created"], "weights_sha256": contract.weights_sha256 if contract else None}
        )


def evaluate_target(target: str, overrides: Sequence[str], *, options: EvaluationOptions, progress: Progress) -> Result:
    """Evaluates `target`: the run that it names, the run of the recipe that it names, or a bare model.

    A bare model is scored on the tasks of `options.recipe`, or on `options.tasks`; without either, `RecipeError` is raised.
    """
    run = find_run(target, options.storage)
    if run is not None:
        whole = _recipe_of(run, overrides)
        recipe = _with_tasks(whole, options, find=run.tasks().find)
        return evaluate_run(recipe, options=options, trained_by=whole, progress=progress)
    if target.endswith((".yaml", ".yml")) or _is_shipped(target):
        whole = load_recipe(find_recipe(target), overrides)
        check_definitions(whole)
        return evaluate_run(_with_tasks(whole, options), options=options, trained_by=whole, progress=progress)
    if options.recipe is not None:
        whole = load_recipe(find_recipe(options.recipe), overrides)
        recipe = _with_tasks(whole, options)
    elif options.tasks:
        whole = recipe = _bare_recipe(target, overrides, options)
    else:
        raise RecipeError(
            f"{target!r} is not a run or a recipe; a bare model needs the tasks of a recipe: --recipe FILE, or --tasks NAME."
        )
    return evaluate_model(target, recipe, options.out, options=options, trained_by=whole, progress=progress)


def check_definitions(recipe: Recipe) -> None:
    """Raises `RunError` if a task is now defined otherwise than when its run was made.

    The run is scored with the definitions that it keeps.
    """
    run = Run(Folder.at(recipe.storage) / recipe.name)
    kept = run.tasks()
    tasks, _ = select_tasks(recipe.data.entries, (), Path.cwd(), to_train=False, find=kept.find_again)
    if changed := kept.changed(tasks):
        raise RunError(
            f"the templates or answers of task {changed[0]!r} changed since run {run.name!r} was made; undo that, or score the run"
            f" by what it was made with: apprentice evaluate {run.folder}."
        )


def _recipe_of(run: Run, overrides: Sequence[str]) -> Recipe:
    with TemporaryDirectory(prefix="apprentice-") as scratch:  # loading needs a local file, and the run may lie in an object store
        file = Path(scratch) / "recipe.yaml"
        file.write_text(run.recipe_file.read_text(), encoding="utf-8")
        return load_recipe(file, overrides)


def _with_tasks(recipe: Recipe, options: EvaluationOptions, find: Find = find_tasks) -> Recipe:
    """The recipe with `options.tasks`, if any, in place of its own; those that it does not train on are held out."""
    if not options.tasks:
        return recipe
    known, held_out = select_tasks(recipe.data.entries, recipe.data.hold_out, Path.cwd(), to_train=False, find=find)
    trained = {task.name for task in known} - held_out
    chosen, _ = select_tasks(options.tasks, (), Path.cwd(), to_train=False, find=find)
    others = tuple(task.name for task in chosen if task.name not in trained)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tasks": options.tasks, "hold_out": others})})


def _bare_recipe(model: str, overrides: Sequence[str], options: EvaluationOptions) -> Recipe:
    """A recipe for evaluation alone: `options.tasks`, all of them held out; paths are relative to the current directory."""
    tasks = list(options.tasks)
    values = {"storage": options.storage, "model.base": model, "data.tasks": tasks, "data.hold_out": tasks}
    with TemporaryDirectory(prefix="apprentice-") as scratch:
        file = Path(scratch) / "recipe.yaml"
        file.write_text("name: model\ntraining: {steps: 1}\n", encoding="utf-8")
        return load_recipe(file, [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *overrides])


def _is_shipped(name: str) -> bool:
    try:
        find_recipe(name)
    except RecipeError:
        return False
    return True


def rebuild_report(target: str, storage: str) -> Result:
    """Makes a report again from its stored predictions, without any model.

    `target` is a run, or a folder with `predictions.parquet`. Raises `EvaluationError` if there are no predictions.
    """
    from apprentice.evaluate.report import predictions
    from apprentice.evaluate.report.write import write_report
    from apprentice.evaluate.stats.summary import summarise

    folder = _reported(target, storage)
    made = summarise(predictions.read(folder))
    write_report(made, folder)
    return made.as_json(), folder


def compare_runs(targets: Sequence[str], out: Path | None, storage: str) -> Result:
    """Writes one report over the predictions of several runs, each with its last subject; all are compared with the first.

    The report goes to `out`, by default `reports/compare-<names>`. Raises `EvaluationError` for a run without predictions.
    """
    from apprentice.evaluate.report import predictions
    from apprentice.evaluate.report.compare import join_tables
    from apprentice.evaluate.report.write import write_report
    from apprentice.evaluate.stats.summary import summarise

    folders = [_reported(target, storage) for target in targets]
    names = [_name_of(target, storage) for target in targets]
    table = join_tables({name: predictions.read(folder) for name, folder in zip(names, folders, strict=True)})
    place = Folder.at(out or Path("reports") / f"compare-{'-'.join(names)}"[:100])
    predictions.save(table, place)
    made = summarise(table)
    write_report(made, place)
    return made.as_json(), place


def _name_of(target: str, storage: str) -> str:
    run = find_run(target, storage)
    return run.name if run is not None else Path(target).name


def _reported(target: str, storage: str) -> Folder:
    """The folder with predictions that `target` names: a run's report, or the folder itself."""
    run = find_run(target, storage)
    folder = run.report if run is not None else Folder.at(target)
    if not (folder / "predictions.parquet").exists():
        raise EvaluationError(f"{target!r} has no predictions yet; score it first with `apprentice evaluate {target}`.")
    return folder


def check_gate(model: Folder) -> None:
    """Raises `EvaluationError` unless a stored verdict says that the weights in `model` passed their recipe's quality gate."""
    file, contract = model / GATE_FILE, read_contract(model)
    if not file.exists():
        raise EvaluationError(
            f"{model} has no verdict of a gate; give its recipe an `evaluation.gate` and score it with `apprentice evaluate`."
        )
    verdict_values = file.read_json()
    if contract is None or verdict_values["weights_sha256"] != contract.weights_sha256:
        raise EvaluationError(f"the verdict in {model} is about other weights; score the model again.")
    if not verdict_values["passed"]:
        from apprentice.evaluate.report.quality_gate import verdict_sentence
        from apprentice.evaluate.report.report_schema import GateVerdict

        verdict = GateVerdict.model_validate({name: verdict_values[name] for name in GateVerdict.model_fields})
        raise EvaluationError(f"{model} did not pass: {verdict_sentence(verdict)}.")
