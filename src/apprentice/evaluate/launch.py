"""Evaluation on Ray: questions are encoded once per layout, scored by one pool of workers per subject, and summed up on the driver.

The only file of this room that knows Ray. Ray must be initialised by the caller.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from apprentice.artifacts import Run, read_contract
from apprentice.data.contract import layout_beside, layout_of
from apprentice.data.layout import Layout
from apprentice.data.pipeline import Corpus
from apprentice.errors import ApprenticeError, EvaluationError, ModelError
from apprentice.evaluate import majority, predictions
from apprentice.evaluate.facts import facts_for
from apprentice.evaluate.pool import Pool, Room, pool_for
from apprentice.evaluate.prompts import Limits, can_show, encoded
from apprentice.evaluate.report import write_report
from apprentice.evaluate.sampling import Request, requests_of
from apprentice.evaluate.scorer import ASKED, Scorer, weight_bytes
from apprentice.evaluate.summary import summarise
from apprentice.recipe import Recipe
from apprentice.storage import Folder
from apprentice.tokenizer import Tokenizer

ENCODED_TOGETHER = 256  # requests
LEAST_TOGETHER, MOST_TOGETHER = 16, 64  # questions of one block: enough to batch, few enough to share among workers
SETTLE_S = 5.0  # how long resources that a stage before still holds may take to come back …
PATIENCE_S = 60.0  # … and how long we wait for one CPU at least
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Subject:
    """A model that is scored: its folder, and with how many exemplars each question is asked (once for each number)."""

    name: str
    folder: Path
    shots: tuple[int, ...] = (0,)


def evaluate(
    recipe: Recipe, corpus: Corpus, subjects: Sequence[Subject], out: Folder | Path, *, run: Run | None = None, progress: Progress
) -> dict[str, Any]:
    """Scores every subject on the test rows of the corpus's tasks; writes predictions and reports to `out`, gives the report.

    The first subject is the one that the others are compared with. A folder with a prompt contract is spoken to as the contract
    says, a bare model in the recipe's layout. `run` adds its training curve and ledger to the report. Raises `EvaluationError`
    where there is nothing to score or a model cannot answer, `ResourcesError` where no worker fits, `ContractError`, `ModelError`.
    """
    started = time.time()
    _check(subjects)
    place = out if isinstance(out, Folder) else Folder.at(out)
    requests, not_scored = _requests(recipe, corpus, subjects)
    spoken = {subject.name: _spoken_to(subject, recipe, corpus) for subject in subjects}
    room = _room()
    majorities = _majorities(corpus, sorted({request.task for request in requests}))
    rendered: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    records: list[dict[str, Any]] = []
    for subject in subjects:
        layout, limits = spoken[subject.name]
        key = (*_identity(layout), limits)
        if key not in rendered:
            progress({"message": f"rendering {len(requests)} questions"})
            rendered[key] = _encode(corpus, requests, layout, limits)
        asked = [question for question in rendered[key] if question["shots"] in subject.shots]
        records += _score(subject, recipe, layout, limits, asked, room, progress)
    first = next(iter(rendered.values()))
    least = min(request.shots for request in requests)
    records += majority.predicted([question for question in first if question["shots"] == least], majorities)
    facts = facts_for(recipe, corpus.tasks, corpus.held_out, majorities, started) | {
        "subjects": [_described(subject, *spoken[subject.name]) for subject in subjects],
        "not_scored": not_scored,
        "test_rows": {name: len(corpus.indices[name].test) for name in majorities},
    }
    table = predictions.with_facts(predictions.scored(records, corpus.tasks), facts)
    predictions.save(table, place)
    report = summarise(table)
    write_report(report, place, history=_history(run), ledger=_ledger(run))
    progress({"message": report["summary"]["sentence"], "done": True})
    return report


def _check(subjects: Sequence[Subject]) -> None:
    names = [subject.name for subject in subjects]
    if not subjects or len(set(names)) < len(names) or majority.NAME in names or any(not subject.shots for subject in subjects):
        raise EvaluationError(
            f"subjects {names}: each needs a name of its own, other than {majority.NAME!r}, and at least one number of shots."
        )


def _requests(recipe: Recipe, corpus: Corpus, subjects: Sequence[Subject]) -> tuple[list[Request], list[dict[str, str]]]:
    """What is asked, and which tasks are not (wholly) scored, with the reason."""
    shots = sorted({k for subject in subjects for k in subject.shots})
    settings = recipe.evaluation
    requests: list[Request] = []
    not_scored: list[dict[str, str]] = []
    for task in corpus.tasks:
        index = corpus.indices[task.name]
        if index.test_source is None or not len(index.test):
            not_scored.append({"task": task.name, "reason": "no test rows" if index.test_source else "no test split"})
            continue
        possible = [k for k in shots if can_show(index, k)]
        if len(possible) < len(shots):
            reason = (
                f"too few training rows for {shots[len(possible)]} exemplars"
                if index.train_source
                else "no training split, so no exemplars"
            )
            not_scored.append({"task": task.name, "reason": reason})
        requests += requests_of(
            task,
            index.test,
            possible,
            max_examples=settings.max_examples,
            templates_per_row=settings.templates_per_row,
            seed=recipe.seed,
        )
    if not requests:
        raise EvaluationError(
            "none of the recipe's tasks has test rows, so there is nothing to score; add a task with a test split."
        )
    return requests, not_scored


def _spoken_to(subject: Subject, recipe: Recipe, corpus: Corpus) -> tuple[Layout, Limits]:
    """The subject's layout and the limits of its prompts."""
    try:
        config = json.loads((subject.folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{subject.folder} is not a model folder: its config.json cannot be read.") from error
    if read_contract(subject.folder) is not None:
        layout = layout_beside(subject.folder)
    elif subject.folder == corpus.layout.tokenizer.folder:
        layout = corpus.layout
    else:
        layout = layout_of(recipe, Tokenizer(subject.folder))
    context = config.get("max_position_embeddings") or config.get("n_positions")
    return layout, Limits(recipe.data.max_length, recipe.evaluation.max_new_tokens, context)


def _described(subject: Subject, layout: Layout, limits: Limits) -> dict[str, Any]:
    return {
        "name": subject.name,
        "shots": list(subject.shots),
        "folder": str(subject.folder),
        "layout": layout.name,
        "contract": "its own" if read_contract(subject.folder) else "the recipe's",
        "prompt_tokens": limits.prompt,
    }


def _identity(layout: Layout) -> tuple[Any, ...]:
    """Equal for layouts that make the same ids of the same texts."""
    return layout.name, layout.system, layout.date, layout.tokenizer.fingerprint, layout.tokenizer.chat_template


def _room() -> Room:
    """What is free now. Stages before us may still be letting go, so this waits, a little for all, longer for one CPU."""
    start = time.monotonic()
    while True:
        total, free = ray.cluster_resources(), ray.available_resources()
        waited = time.monotonic() - start
        idle = free.get("CPU", 0) >= total.get("CPU", 0)
        if idle or waited > PATIENCE_S or (waited > SETTLE_S and free.get("CPU", 0) >= 1):
            break
        time.sleep(0.2)
    cpus = int(free.get("CPU", 0))
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        cpus = min(cpus, len(os.sched_getaffinity(0)))  # a local session may count more CPUs than there are cores
    # What is free on a busy cluster may lie scattered, one CPU here and one there.
    together = min((node for node in nodes if node), default=1) if idle else 1
    return Room(cpus, together, int(free.get("GPU", 0)), int(free.get("memory", 0)))


def _encode(corpus: Corpus, requests: Sequence[Request], layout: Layout, limits: Limits) -> list[dict[str, Any]]:
    """The questions of all requests, sorted. Ray tasks render and tokenise; they share one copy of the corpus on each node."""
    ordered = sorted(requests)  # rows that lie together are read together
    parts = [ordered[start : start + ENCODED_TOGETHER] for start in range(0, len(ordered), ENCODED_TOGETHER)]
    work, shared = ray.remote(num_cpus=1)(encoded), ray.put(corpus)
    tables = _gathered([work.remote(shared, part, layout, limits) for part in parts])
    return [record for table in tables for record in table.to_pylist()]


def _score(
    subject: Subject,
    recipe: Recipe,
    layout: Layout,
    limits: Limits,
    asked: Sequence[dict[str, Any]],
    room: Room,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The records of one subject: every question with its prediction; dropped questions without."""
    answers: dict[int, dict[str, Any]] = {}
    start, total = time.monotonic(), sum(not question["dropped"] for question in asked)
    if total:
        pool = pool_for(room, weight_bytes(subject.folder, recipe.model, gpu=room.gpus > 0), math.ceil(total / LEAST_TOGETHER))
        tables = [predictions.table_of(block, ASKED) for block in _blocks(asked, pool.workers)]
        progress({"message": f"{subject.name}: loading on {pool.workers} worker{'s' if pool.workers > 1 else ''}"})
        for block in _mapped(tables, Scorer, (subject.folder, recipe.model, layout, limits, pool), pool):
            for answer in block.to_pylist():
                if answer["failure"]:
                    raise EvaluationError(f"{subject.name}: {answer['failure']}")
                answers[answer["place"]] = {"prediction": answer["prediction"], "choice_logprobs": answer["choice_logprobs"]}
            left = (time.monotonic() - start) * (total / max(1, len(answers)) - 1)
            progress({"message": f"{subject.name}: {len(answers)} of {total} questions", "eta_s": left})
    blank = {"prediction": None, "choice_logprobs": None}
    return [{**question, **answers.get(place, blank), "subject": subject.name} for place, question in enumerate(asked)]


def _blocks(asked: Sequence[dict[str, Any]], workers: int) -> list[list[dict[str, Any]]]:
    """The questions that are not dropped, in blocks of one kind and like length, the longest first; two or more per worker."""
    blocks = []
    for ranked in (False, True):
        chosen = [
            {"place": place, **question}
            for place, question in enumerate(asked)
            if not question["dropped"] and bool(question["choices"]) is ranked
        ]
        chosen.sort(key=lambda question: (-question["prompt_tokens"], question["place"]))
        size = min(MOST_TOGETHER, max(LEAST_TOGETHER, math.ceil(len(chosen) / (2 * workers))))
        blocks += [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return blocks


def _mapped(tables: Sequence[pa.Table], worker: type, arguments: tuple[Any, ...], pool: Pool) -> Iterator[pa.Table]:
    """Each table through a pool of workers, as the results come."""
    dataset = ray.data.from_arrow(list(tables)).map_batches(
        worker,
        batch_size=None,  # one table, one call
        batch_format="pyarrow",
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(size=pool.workers),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    dataset.context.enable_progress_bars = False
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _gathered(references: list[Any]) -> list[Any]:
    """The results of Ray tasks, in order; an error of ours arrives as itself, without Ray's wrapping."""
    try:
        return list(ray.get(references))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ApprenticeError):
            raise error.cause from None
        raise


def _majorities(corpus: Corpus, names: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """Task → its majority answer."""
    work, shared = ray.remote(num_cpus=1)(majority.majority_of), ray.put(corpus)
    return dict(zip(names, _gathered([work.remote(shared, name) for name in names]), strict=True))


def _history(run: Run | None) -> list[dict[str, Any]]:
    """The run's training record, if it kept one: a line per step and one per validation."""
    file = run.folder / "steps.jsonl" if run else None
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def _ledger(run: Run | None) -> dict[str, Any] | None:
    return dict(run.ledger_file.read_json()) if run and run.ledger_file.exists() else None
