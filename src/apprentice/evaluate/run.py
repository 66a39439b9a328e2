"""Evaluation on Ray: from models and test rows to predictions and a report.

    test rows → requests → encoded questions → answers → predictions.parquet → report
                driver     Ray tasks           Ray actors     driver

Questions are encoded once for each prompt format, and answered by one pool of workers for each subject (a model or an endpoint).
Answers are stored as they arrive (`scoring.answer_cache`), so an interrupted evaluation continues where it stopped. Ray must be
initialised by the caller.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray

from apprentice.data.encoding.prompt_format import Layout
from apprentice.data.stream import Corpus
from apprentice.errors import EvaluationError
from apprentice.evaluate.questions.evaluation_subjects import (
    Subject,
    SubjectSettings,
    check_subjects,
    make_subject_settings,
    subject_entry,
)
from apprentice.evaluate.questions.question_encoding import encode_questions, has_enough_exemplars
from apprentice.evaluate.questions.row_selection import QuestionRequest, select_requests
from apprentice.evaluate.report import predictions
from apprentice.evaluate.report.metadata import make_metadata
from apprentice.evaluate.report.report_schema import Report
from apprentice.evaluate.report.run_history import read_history
from apprentice.evaluate.report.write import write_report
from apprentice.evaluate.scoring import majority_baseline as majority
from apprentice.evaluate.scoring.answer_cache import ANSWER, PARTS, AnswerCache, cache_key
from apprentice.evaluate.scoring.endpoint import EndpointScorer
from apprentice.evaluate.scoring.judge import ReplyQuestions, judge_questions, likelihood_questions, written
from apprentice.evaluate.scoring.rank import ranked
from apprentice.evaluate.scoring.scorer import LEAST_TOGETHER, Scorer, make_blocks, with_prediction
from apprentice.evaluate.stats.summary import summarise
from apprentice.model_pool.actors import find_free_resources, gather_results, map_tables, resolve_model_dtype
from apprentice.model_pool.answer_settings import TokenLimits
from apprentice.model_pool.model import load_worker_model, weight_bytes
from apprentice.model_pool.pool import FreeResources, WorkerPool, size_pool
from apprentice.pretrained.architecture import gives_rewards
from apprentice.pretrained.hub import local_folder
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.run.identity import public_base
from apprentice.storage import Folder

ENCODED_TOGETHER = 256  # requests of one Ray task
Progress = Callable[[dict[str, Any]], None]
Record = dict[str, Any]


def evaluate(
    recipe: Recipe,
    corpus: Corpus,
    subjects: Sequence[Subject],
    out: Folder,
    *,
    run: Run | None = None,
    known: Iterable[Folder] = (),
    contamination: Mapping[str, Any] = {},
    trained_clusters: Collection[str] = (),
    progress: Progress,
) -> Report:
    """Scores every subject on the test rows of the corpus's tasks; writes predictions and reports to `out`, returns the report.

    The other subjects are compared with the first. A folder with a prompt contract is prompted in the contract's format, a bare
    model in the recipe's. Answers stored in `out`, or in the folders `known`, are reused. `run` adds its training curve and ledger
    to the report; `contamination` (from `run_history.summarise_contamination`) adds what is known of each task's test rows;
    `trained_clusters` are the clusters of training tasks, which need not be among the scored ones. Raises `EvaluationError` if
    there is nothing to score or a model cannot answer, `ResourcesError` if no worker fits, `ContractError`, `ModelError`.
    """
    started = time.time()
    check_subjects(subjects)
    requests, not_scored = _requests(recipe, corpus, subjects)
    resources = find_free_resources()
    asked_for, recipe = recipe, recipe.model_copy(update={"model": resolve_model_dtype(recipe.model, resources)})
    spoken = {subject.name: make_subject_settings(subject, recipe, corpus) for subject in subjects}
    majorities = _majorities(corpus, sorted({request.task for request in requests}))
    answers = AnswerCache(out, known)
    rendered: dict[tuple[Any, ...], list[Record]] = {}
    records: list[Record] = []
    for subject in subjects:
        answer_settings, limits = spoken[subject.name].answer_settings, spoken[subject.name].limits
        key = spoken[subject.name].prompt_key
        if key not in rendered:
            progress({"message": f"rendering {len(requests)} questions"})
            rendered[key] = _encode(corpus, requests, answer_settings.layout, limits)
        asked = [question for question in rendered[key] if question["shots"] in subject.shots]
        records += _score(subject, recipe, spoken[subject.name], asked, resources, answers, progress)
    if recipe.evaluation.judge is not None:
        _judge(recipe, corpus, subjects, spoken, rendered, records, resources, progress)
    first = next(iter(rendered.values()))
    least = min(request.shots for request in requests)
    plain = [question for question in first if question["shots"] == least and not question["perturbation"]]
    records += majority.predicted(plain, majorities)
    facts = make_metadata(asked_for, corpus.tasks, corpus.held_out, majorities, started, trained_clusters) | {
        "subjects": [subject_entry(subject, spoken[subject.name]) for subject in subjects],
        "not_scored": not_scored,
        "test_rows": {name: len(corpus.indices[name].test) for name in majorities},
        "story": read_history(run),
    }
    for name, about in facts["tasks"].items():
        about["contaminated"] = contamination.get(name)
    table = predictions.with_metadata(predictions.scored(records, corpus.tasks), facts)
    predictions.save(table, out)
    answers.close()
    report = summarise(table)
    write_report(report, out)
    progress({"message": report.summary.sentence, "done": True})
    return report


def _requests(recipe: Recipe, corpus: Corpus, subjects: Sequence[Subject]) -> tuple[list[QuestionRequest], list[dict[str, str]]]:
    """Requests of all tasks, and the tasks that are not scored, or not with every number of exemplars, with the reason.

    Raises `EvaluationError` if there are no requests.
    """
    shots = sorted({k for subject in subjects for k in subject.shots})
    settings = recipe.evaluation
    requests: list[QuestionRequest] = []
    not_scored: list[dict[str, str]] = []
    for task in corpus.tasks:
        index = corpus.indices[task.name]
        if index.test_source is None or not len(index.test):
            not_scored.append({"task": task.name, "reason": "no test rows" if index.test_source else "no test split"})
            continue
        possible = [k for k in shots if has_enough_exemplars(index, k)]
        if len(possible) < len(shots):
            reason = (
                f"too few training rows for {shots[len(possible)]} exemplars"
                if index.train_source
                else "no training split, so no exemplars"
            )
            not_scored.append({"task": task.name, "reason": reason})
        if not possible:
            continue
        requests += select_requests(
            task,
            index.test,
            possible,
            max_examples=settings.max_examples,
            templates_per_row=settings.templates_per_row,
            seed=recipe.seed,
            perturbations=settings.perturbations,
        )
    if not requests:
        raise EvaluationError(
            "none of the recipe's tasks has test rows, so there is nothing to score; add a task with a test split."
        )
    return requests, not_scored


def _encode(corpus: Corpus, requests: Sequence[QuestionRequest], layout: Layout, limits: TokenLimits) -> list[dict[str, Any]]:
    """Questions of all requests, sorted. Ray tasks render and tokenise them; they share one copy of the corpus on each node."""
    ordered = sorted(requests)  # so that neighbouring rows are read together
    parts = [ordered[start : start + ENCODED_TOGETHER] for start in range(0, len(ordered), ENCODED_TOGETHER)]
    work, shared = ray.remote(num_cpus=1)(encode_questions), ray.put(corpus)
    tables = gather_results([work.remote(shared, part, layout, limits) for part in parts])
    return [record for table in tables for record in table.to_pylist()]


def _score(
    subject: Subject,
    recipe: Recipe,
    spoken: SubjectSettings,
    asked: Sequence[Record],
    resources: FreeResources,
    answers: AnswerCache,
    progress: Progress,
) -> list[Record]:
    """Records of one subject: each question with its answer, stored or new, or with the reason why it has none."""
    blank = dict.fromkeys(ANSWER) | {"unscored": ""}
    records = [{**question, **blank, "subject": subject.name, "key": None} for question in asked]
    for record in records:
        if not record["dropped"] and spoken.fingerprint is not None:
            record["key"] = cache_key(spoken.fingerprint, record)
            record |= answers.find(record["key"]) or {}
    open_places = [place for place, record in enumerate(records) if not record["dropped"] and record["prediction"] is None]
    total = sum(not record["dropped"] for record in records)
    if len(open_places) < total:
        progress({"message": f"{subject.name}: {total - len(open_places)} of {total} answers were there already"})
    start, done = time.monotonic(), 0
    for block in _answered(subject, recipe, spoken, [(place, asked[place]) for place in open_places], resources, progress):
        for answer in block:
            if answer["failure"]:
                raise EvaluationError(f"{subject.name}: {answer['failure']}")
            records[answer["place"]] = with_prediction(records[answer["place"]], answer, recipe.evaluation.rank_by)
        fresh = [records[answer["place"]] for answer in block]
        answers.add(fresh)
        done += len(block)
        left = (time.monotonic() - start) * (len(open_places) / done - 1)
        progress({"message": f"{subject.name}: {total - len(open_places) + done} of {total} questions", "eta_s": left})
    for record in records:  # stored answers may have been ranked by another rule
        if record["choice_logprobs"]:
            record["prediction"] = ranked(record, recipe.evaluation.rank_by)
    return records


def _judge(
    recipe: Recipe,
    corpus: Corpus,
    subjects: Sequence[Subject],
    spoken: Mapping[str, SubjectSettings],
    rendered: Mapping[tuple[Any, ...], Sequence[Record]],
    records: list[Record],
    resources: FreeResources,
    progress: Progress,
) -> None:
    """Adds the judge's reward to the record of every generated reply, in place.

    Replies of a subject whose prompts have the same token ids as the first subject's also get their log-ratio to the first subject.
    """
    replies = written(records)
    judge = Subject("judge", local_folder(str(recipe.evaluation.judge)))
    if not gives_rewards(judge.folder):
        raise EvaluationError(
            f"evaluation.judge {public_base(str(recipe.evaluation.judge))} is no reward model; name a run with"
            " `training.objective: reward`, or another model that gives an answer a number."
        )
    its = make_subject_settings(judge, recipe, corpus)
    its = replace(its, answer_settings=replace(its.answer_settings, priors=False))
    asked = judge_questions(
        _encode(corpus, list(replies), its.answer_settings.layout, its.limits), replies, its.answer_settings.layout
    )
    for record, reward in _values(judge, recipe, its, asked, resources, progress):
        record["reward"] = reward
    base = subjects[0]
    for subject in subjects[1:]:
        answer_settings = spoken[subject.name].answer_settings
        if subject.endpoint or base.endpoint or spoken[subject.name].prompt_key != spoken[base.name].prompt_key:
            continue
        plain = replace(spoken[subject.name], answer_settings=replace(answer_settings, priors=False))
        own = likelihood_questions(rendered[plain.prompt_key], replies, subject.name, answer_settings.layout)
        sums = [_values(model, recipe, plain, own, resources, progress) for model in (subject, base)]
        counts = {id(record): len(question["choice_ids"][0]) for question, (record,) in own}
        for (record, ours), (_, theirs) in zip(*sums, strict=True):
            record |= {"log_ratio": ours - theirs, "reply_tokens": counts[id(record)]}


def _values(
    subject: Subject, recipe: Recipe, spoken: SubjectSettings, asked: ReplyQuestions, resources: FreeResources, progress: Progress
) -> list[tuple[Record, float]]:
    """Each record with the value (reward or log-probability) that `subject` gives to its reply as a choice, in order."""
    found: dict[int, list[float]] = {}
    for block in _answered(
        subject, recipe, spoken, [(place, question) for place, (question, _) in enumerate(asked)], resources, progress
    ):
        for answer in block:
            if answer["failure"]:
                raise EvaluationError(f"{subject.name}: {answer['failure']}")
            found[answer["place"]] = answer["choice_logprobs"]
    return [pair for place, (_, records) in enumerate(asked) for pair in zip(records, found[place], strict=True)]


def _answered(
    subject: Subject,
    recipe: Recipe,
    spoken: SubjectSettings,
    asked: Sequence[tuple[int, Record]],
    resources: FreeResources,
    progress: Progress,
) -> Iterator[list[Record]]:
    """Yields blocks of answers (records of `scorer.ANSWER_BLOCK`) to the (place, question) pairs `asked`, as they arrive."""
    if not asked:
        return
    worker: type = Scorer
    arguments: tuple[Any, ...]
    if subject.endpoint is not None:
        pool = WorkerPool(1, 1, 0)
        worker, arguments = EndpointScorer, (subject.endpoint, spoken.answer_settings)
        progress({"message": f"{subject.name}: asking {subject.endpoint.url}"})
    else:
        bytes_of_one = weight_bytes(subject.folder, recipe.model, gpu=resources.gpus > 0)
        pool = size_pool(resources, bytes_of_one, math.ceil(len(asked) / LEAST_TOGETHER))
        load = partial(load_worker_model, subject.folder, recipe.model, pool)
        arguments = (load, str(subject.folder), spoken.answer_settings)
        progress({"message": f"{subject.name}: loading on {pool.workers} worker{'s' if pool.workers > 1 else ''}"})
    for block in map_tables(make_blocks(asked, pool.workers), worker, arguments, pool):
        yield block.to_pylist()


def _majorities(corpus: Corpus, names: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """Task → its majority answer or None, computed in Ray tasks."""
    work, shared = ray.remote(num_cpus=1)(majority.majority_answer), ray.put(corpus)
    return dict(zip(names, gather_results([work.remote(shared, name) for name in names]), strict=True))


__all__ = ["PARTS", "Subject", "evaluate", "predictions"]
