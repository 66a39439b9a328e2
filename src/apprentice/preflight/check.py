"""Preflight checks: everything that can be known before hardware is reserved, each check with one sentence.

`check` runs all of them and lists their findings; `check_before_writing` and `check_index` raise the first that fails, so that a
stage stops before it has written or reserved anything.
"""

from __future__ import annotations

import json
import struct
import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import ray

from apprentice.data.corpus import packing_strategy
from apprentice.data.encoding.prompt_contract import check_base, layout_of, layout_version
from apprentice.data.encoding.prompt_format import Layout
from apprentice.data.encoding.quality import classes_of, layouts_of, shown_in_the_prompt
from apprentice.data.sources.cache import cache_cleared
from apprentice.data.sources.locate import on_the_hub, resolve
from apprentice.data.stream import Corpus, estimate_steps, make_corpus
from apprentice.errors import ApprenticeError, ChatTemplateError, ContractError, DataError, RecipeError, ServingError, StorageError
from apprentice.preflight.auxiliary_models import check_auxiliary_models
from apprentice.pretrained.architecture import RELATIVE_POSITIONS, check_generates_text, model_config
from apprentice.pretrained.hub import describe_download, local_folder
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.ray_cluster.nodes import call_on_every_node, node_resources
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.run.identity import public_base
from apprentice.storage import Folder
from apprentice.tasks.exposure import count_exposures
from apprentice.tasks.leaks import leaks
from apprentice.tasks.registry import select_tasks


@dataclass(frozen=True)
class Finding:
    """The result of one check: its subject, whether it passed, and one sentence."""

    subject: str
    ok: bool
    message: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(recipe: Recipe, connected: Callable[[], AbstractContextManager[None]]) -> list[Finding]:
    """Runs all checks, in the order in which a person would correct them, and leaves no files behind.

    Checks that need Ray run only after all others passed, inside `connected()`; a dry run of the data and the model comes
    last.
    """
    with cache_cleared(recipe):
        findings = _findings(recipe, [subject for subject in CHECKS if subject not in NEED_RAY])
        if not all(finding.ok for finding in findings):
            return findings
        with connected():
            findings = [*findings, *_findings(recipe, NEED_RAY)]
            if all(finding.ok for finding in findings):
                with tempfile.TemporaryDirectory(prefix="apprentice-") as folder:
                    findings += _dry_run(recipe, Run(Folder.at(folder) / recipe.name))
    return findings


def _findings(recipe: Recipe, subjects: Sequence[str]) -> list[Finding]:
    """Runs the checks on `subjects`; a failure that several share, such as a missing task file, is listed once."""
    told: set[str] = set()
    found = []
    for subject in subjects:
        finding = _finding(subject, CHECKS[subject], recipe)
        if finding.ok or finding.message not in told:
            found.append(finding)
        told.add(finding.message)
    return found


def check_before_writing(recipe: Recipe) -> None:
    """Runs the checks in `CHECKS`; raises the first failure."""
    with cache_cleared(recipe, keep=True):
        for look in CHECKS.values():
            look(recipe)


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


def _finding(subject: str, look: Callable[..., str], *arguments: Any) -> Finding:
    try:
        return Finding(subject, True, look(*arguments))
    except ApprenticeError as error:
        return Finding(subject, False, str(error))


def _tasks(recipe: Recipe) -> str:
    tasks, held_out = select_tasks(recipe.data.entries, recipe.data.hold_out, Path.cwd())
    if found := leaks(tasks, held_out):
        held, trained, place = found[0]
        others = sorted({f"{one} through {other}" for one, other, _ in found[1:]} - {f"{held} through {trained}"})
        more = f" The same holds for {', '.join(others)}." if others else ""
        raise RecipeError(
            f"data.hold_out: {held!r} is held out, but {trained!r} trains on the same rows ({place}); hold out both, or leave one"
            f" out of data.tasks.{more}"
        )
    if recipe.data.layout != "chat" and (told := [task for task in tasks if any(one.has_turns for one in task.templates)]):
        raise RecipeError(
            f"data.layout: {recipe.data.layout} has no turns, and task {told[0].name!r} holds conversations; use `layout: chat`."
        )
    if recipe.data.qualities is not None:
        classes_of(recipe.data.qualities, tasks)
    objective = recipe.training.objective
    single = [task.name for task in tasks if recipe.training.aim.pairs and task.name not in held_out and not task.has_pairs]
    if single:
        raise RecipeError(
            f"training.objective {objective} learns from preferences, and task {single[0]!r} has no rejected answers; name files of"
            " preferences in data.tasks (`{preferences: pairs.jsonl}`), or hold the task out."
        )
    silent = [task.name for task in tasks if not task.has_answers and (task.name in held_out or not recipe.training.aim.rounds)]
    if silent:
        raise RecipeError(
            f"task {silent[0]!r} has prompts without answers, from which only training.objective grpo learns and with which nothing"
            " can be scored; leave it out of data.tasks, or name another objective."
        )
    if recipe.training.aim.head and (written := [task.name for task in tasks if not task.is_ranked]):
        raise RecipeError(
            f"training.objective {objective} makes a model that writes nothing, and task {written[0]!r} is scored by what is"
            " written; leave it out of data.tasks, or take one whose choices are ranked."
        )
    return count_exposures(tasks, held_out)


def _downloads(recipe: Recipe) -> str:
    tasks, _ = select_tasks(recipe.data.entries, recipe.data.hold_out, Path.cwd())
    named = (recipe.model.base, recipe.training.dpo.reference, recipe.training.grpo.reward)
    models = dict.fromkeys(found for name in named if name and (found := describe_download(name)))
    sets = sorted({found for task in tasks if (found := on_the_hub(task, recipe.data.root))})
    wanted = [f"model {model}" for model in models]
    wanted += [f"{len(sets)} dataset{'s' if len(sets) > 1 else ''} from the hub ({', '.join(sets)}; sizes unknown)"] if sets else []
    return "; ".join(wanted) or "nothing"


def _model(recipe: Recipe) -> str:
    from apprentice.pretrained.trust import check_model_folder

    tokenizer = Tokenizer(local_folder(recipe.model.base, trust=recipe.model.trust))
    check_model_folder(tokenizer.folder, trust=recipe.model.trust)
    layout = layout_of(recipe, tokenizer, layout_version(Run(Folder.at(recipe.storage) / recipe.name).format))
    _check_turns(layout)
    ancestors = check_base(recipe, tokenizer.folder)
    packing_strategy(recipe, tokenizer.folder)
    _check_length(recipe, tokenizer.folder)
    check_auxiliary_models(recipe, tokenizer)
    _check_engine(recipe, tokenizer.folder)
    if not recipe.training.aim.head:
        check_generates_text(tokenizer.folder)
    line = " → ".join([*ancestors, public_base(recipe.model.base)])
    more = ""
    if (named := recipe.data.qualities) is not None:
        classes = ", ".join(f"{name} ({quality.weight:g})" for name, quality in named.items())
        more = f", classes {classes} {'' if shown_in_the_prompt(layouts_of(named, layout)) else 'not '}shown in the prompt"
    more += layout.turns.remarks if layout.turns is not None else ""
    return f"{line}, layout {layout.name}, an answer ends with {tokenizer.decode(layout.end_ids, skip_special=False)!r}{more}"


def _check_length(recipe: Recipe, folder: Path) -> None:
    """Raises `RecipeError` if `data.max_length` exceeds the number of positions of the model."""
    config = model_config(folder)
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if config.get("model_type") in RELATIVE_POSITIONS:
        positions = None
    if positions is not None and recipe.data.max_length > positions:
        raise RecipeError(
            f"data.max_length {recipe.data.max_length} is more than the {positions} positions of"
            f" {public_base(recipe.model.base)}; lower it, or name a model with a longer context."
        )


def _check_engine(recipe: Recipe, folder: Path) -> None:
    """Raises `ServingError` if the recipe's serving engine, installed or not, cannot decode the model that the recipe trains."""
    from apprentice.models.tuning.methods import TUNING_METHODS
    from apprentice.serve.engines.factory import check_decodes

    engine, method = recipe.serving.engine, recipe.tuning.method
    check_decodes(engine, folder)
    if engine == "vllm" and TUNING_METHODS[method].merge is None:
        raise ServingError(
            f"serving.engine vllm would leave out what tuning.method {method} trains, which cannot become part of the weights; use"
            " serving.engine transformers, or tuning.method lora."
        )


def _check_turns(layout: Layout) -> None:
    """Raises `ContractError` if the chat template refuses a question, or ends turns with tokens that an answer may hold."""
    try:
        layout.prompt("a")
    except ChatTemplateError as error:
        told = " after data.system" if layout.system else ""
        raise ContractError(
            f"the chat template of {layout.tokenizer.folder} refuses a question{told}: {' '.join(str(error.__cause__).split())}."
            " Leave out what it has no turn for, or give another in data.chat_template."
        ) from error
    if layout.name == "chat" and not layout.tokenizer.is_added(layout.end_ids[-1]):
        end = layout.tokenizer.decode(layout.end_ids, skip_special=False)
        raise ContractError(
            f"the chat template ends an answer with {end!r}, which is {len(layout.end_ids)} ordinary tokens to this tokenizer: a"
            " reply would stop wherever it comes to the last of them. End turns with `{{ eos_token }}` in data.chat_template, or"
            " name a base that has it as a token of its own."
        )


def _storage(recipe: Recipe) -> str:
    from apprentice.train.metrics.backends import check_backends_installed

    folder = Folder.at(recipe.storage)
    mark = uuid.uuid4().hex
    probe = folder / f".probe-{mark}"
    try:
        was_there = folder.exists()
        try:
            probe.write_text(mark)
            answers = call_on_every_node(_seen, probe, mark) if ray.is_initialized() else {}
        finally:
            probe.delete()
            if not was_there and folder.exists() and not folder.children():
                folder.delete()
    except OSError as error:
        raise StorageError(f"storage {folder} cannot be written to: {error}. Choose another `storage`.") from error
    if blind := {name: reason for name, reason in answers.items() if reason}:
        name, reason = next(iter(blind.items()))
        raise StorageError(
            f"storage {folder} is not the same folder on every node: {len(blind)} of {len(answers)} nodes do not see what is"
            f" written here, {name} among them ({reason}). Mount it everywhere, give the nodes its credentials, or use s3://…."
        )
    check_backends_installed(recipe)
    seen = f", seen by {len(answers)} nodes" if answers else ""
    return f"{folder}{seen}" + "".join(f", figures to {name} too" for name in recipe.training.tracking)


def _seen(probe: Folder, mark: str) -> str:
    """Empty if this node reads `mark` in the file `probe`, which another node wrote, and can write beside it; else the reason."""
    try:
        if probe.read_text() != mark:
            return "another file is there"
        answer = Folder(f"{probe.uri}-{uuid.uuid4().hex}")
        answer.write_text(mark)
        answer.delete()
    except (OSError, StorageError) as error:
        return " ".join(str(error).split())[:200]
    return ""


def _sources(recipe: Recipe) -> str:
    tasks, _ = select_tasks(recipe.data.entries, recipe.data.hold_out, Path.cwd())
    rows = 0
    storage = Folder.at(recipe.storage)
    rules = Run(storage / recipe.name).format  # as for the run's index, so that both use the same converted files
    for task in tasks:
        source = resolve(task, "train", root=recipe.data.root, cache=storage / "cache", rules=rules)
        rows += source.rows if source is not None else 0
    return f"{rows} training rows"


def _resources(recipe: Recipe) -> str:
    from apprentice.models.loading import check_dtype, resolve_dtype
    from apprentice.models.tuning.methods import check_tuning
    from apprentice.train.distributed.async_validation import validates_asynchronously
    from apprentice.train.distributed.resources import GIB, check_resources, required_resources
    from apprentice.train.engine.deepspeed_config import micro_batch
    from apprentice.train.memory.measure import expected

    folder = local_folder(recipe.model.base, trust=recipe.model.trust)
    on_gpu = recipe.training.resources.gpus > 0
    check_dtype(recipe.model.dtype, folder, on_gpu=on_gpu)
    check_tuning(recipe.tuning, on_gpu=on_gpu)
    parameters = sum(_parameters(file) for file in sorted(folder.glob("*.safetensors")))
    dtype = resolve_dtype(recipe.model.dtype, "cuda" if on_gpu else "cpu")
    ask = required_resources(recipe, parameters, dtype)
    nodes = node_resources()
    check_resources(ask, nodes)
    aside = "; one more validates aside" if validates_asynchronously(recipe, nodes) else ""
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    trained = parameters if recipe.tuning.method == "full" else 0  # other methods train few parameters in comparison
    length = recipe.data.packing.length
    micro = micro_batch(recipe.training, workers=ask.workers, length=length, on_gpu=on_gpu)
    each = expected(recipe, parameters, trained, dtype, workers=ask.workers, micro=micro, length=length)
    sizes = {part.name: getattr(each, part.name) for part in fields(each)}
    parts = [f"{name} {'unknown' if size is None else f'{size / GIB:.1f}'}" for name, size in sizes.items()]
    gpus = f", {ask.gpus:g} GPUs" if ask.gpus else ""
    writers = recipe.training.grpo.actors if recipe.training.aim.rounds else 0
    beside = f"; beside them {writers} that write{'s' if writers == 1 else ''} replies, with three models each" if writers else ""
    return (
        f"{ask.workers} workers of {ask.cpus:g} CPUs{gpus} and about {each.total / GIB:.1f} GiB each ({', '.join(parts)}, with"
        f" {micro} rows at once){beside}{aside}; {cpus:g} CPUs there"
    )


def _dry_run(recipe: Recipe, scratch: Run) -> list[Finding]:
    """Findings from a dry run: the frozen index, a first window of rows and one pass of the model."""
    from apprentice.preflight import dry_run

    try:
        corpus = make_corpus(recipe, scratch)
        rows = dry_run.render_first_rows(corpus)
    except ApprenticeError as error:
        return [Finding("training", False, str(error))]
    training = _finding("training", check_index, recipe, corpus)
    if recipe.training.aim.rounds:
        findings = [training, _finding("rows", dry_run.describe_prompts, corpus, rows)]
    else:
        told_of = {"rows": dry_run.describe_rows, "packing": dry_run.compare_packing}
        findings = [training, *(_finding(subject, look, corpus, rows) for subject, look in told_of.items())]
    if all(finding.ok for finding in findings):
        speed = dry_run.measure_speed(corpus, rows)
        findings.append(_finding("duration", dry_run.describe_duration, corpus, speed))
        findings.append(_finding("evaluation", _evaluation, corpus, speed.reading))
    return findings


def _evaluation(corpus: Corpus, reading: float | None) -> str:
    """One sentence on the number of evaluation questions, and roughly how long they take.

    `reading` is the speed of a CPU worker's forward pass in tokens/s; without it no time is given. Raises `DataError` if no
    task has test rows.
    """
    from apprentice.evaluate.questions.row_selection import select_requests
    from apprentice.preflight.dry_run import format_duration

    settings, length = corpus.recipe.evaluation, corpus.recipe.data.max_length
    base = settings.shots if settings.baseline_shots is None else settings.baseline_shots
    columns = [*base, *settings.shots]
    asked, tokens = 0, 0.0
    for task in corpus.tasks:
        index = corpus.indices[task.name]
        for shots in columns:
            found = select_requests(
                task,
                index.test,
                [shots],
                max_examples=settings.max_examples,
                templates_per_row=settings.templates_per_row,
                seed=0,
                perturbations=settings.perturbations,
            )
            written = settings.max_new_tokens * WRITTEN if task.choices is None else 0
            asked += len(found)
            tokens += len(found) * (min(index.mean_tokens * (1 + shots), length) + written)
    silent = [task.name for task in corpus.tasks if not len(corpus.indices[task.name].test)]
    if not asked and any(task.has_answers for task in corpus.tasks):
        raise DataError(
            "none of the recipe's tasks has test rows, so nothing can be scored; give one a test split, in `files` or `splits` of"
            " its source, or as `test` of an entry such as `{alpaca: FILE, test: FILE}`."
        )
    if not asked:
        return "nothing can be scored: the tasks have prompts without answers"
    unasked = f"; none of {', '.join(silent[:3])}{', …' if len(silent) > 3 else ''}, without test rows" if silent else ""
    cpus = sum(node.get("CPU", 0.0) for node in node_resources())
    time = "" if reading is None else f", {format_duration(tokens / (reading * max(1.0, cpus)))}, roughly"
    return f"{asked:,} questions to {'base and tuned model' if base else 'the tuned model'}{time}{unasked}"


def _parameters(file: Path) -> int:
    """Number of parameters in a safetensors file, from its header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


WRITTEN = 8  # decoding one token takes as long as reading so many of a prompt: measured for 16 to 32 replies at once
CHECKS: dict[str, Callable[[Recipe], str]] = {
    "tasks": _tasks,
    "downloads": _downloads,
    "model": _model,
    "sources": _sources,
    "storage": _storage,
    "resources": _resources,
}
NEED_RAY = ("storage", "resources")
