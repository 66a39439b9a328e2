"""Evaluation on Ray: from models and test rows to predictions and a report.

    test rows → requests → encoded questions → answers → predictions.parquet → report
                driver     Ray tasks           Ray actors     driver

Questions are encoded once for each prompt format, and answered by one pool of workers for each subject (a model or an endpoint).
Answers are stored as they arrive (`scoring.answer_cache`), so an interrupted evaluation continues where it stopped. Ray must be
initialised by the caller.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from apprentice.data.encoding.prompt_format import Layout
from apprentice.data.stream import Corpus
from apprentice.errors import EvaluationError
from apprentice.evaluate.questions.evaluation_subjects import (
    PromptKey,
    Subject,
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
from apprentice.evaluate.scoring.answer_cache import PARTS, AnswerCache
from apprentice.evaluate.scoring.judge import group_replies, judge_questions, likelihood_questions
from apprentice.evaluate.scoring.subject_scorer import Progress, Record, SubjectScorer
from apprentice.evaluate.stats.summary import summarise
from apprentice.model_pool.actors import find_free_resources, gather_results, resolve_model_dtype
from apprentice.model_pool.answer_settings import TokenLimits
from apprentice.pretrained.architecture import gives_rewards
from apprentice.pretrained.hub import local_folder
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.run.identity import public_base
from apprentice.storage import Folder

ENCODED_TOGETHER = 256  # requests of one Ray task


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
    scorers = _make_scorers(recipe, corpus, subjects, progress)
    majorities = _majorities(corpus, sorted({request.task for request in requests}))
    answers = AnswerCache(out, known)
    questions: dict[PromptKey, list[Record]] = {}
    records: list[Record] = []
    for scorer in scorers:
        key = scorer.settings.prompt_key
        if key not in questions:
            progress({"message": f"rendering {len(requests)} questions"})
            questions[key] = _encode(corpus, requests, scorer.settings.answer_settings.layout, scorer.settings.limits)
        own = [question for question in questions[key] if question["shots"] in scorer.subject.shots]
        records += scorer.answer_questions(own, answers)
    if recipe.evaluation.judge is not None:
        _judge(corpus, scorers, questions, records)
    least = min(request.shots for request in requests)
    first = next(iter(questions.values()))
    plain = [question for question in first if question["shots"] == least and not question["perturbation"]]
    records += majority.baseline_records(plain, majorities)
    metadata = make_metadata(recipe, corpus.tasks, corpus.held_out, majorities, started, trained_clusters) | {
        "subjects": [subject_entry(scorer.subject, scorer.settings) for scorer in scorers],
        "not_scored": not_scored,
        "test_rows": {name: len(corpus.indices[name].test) for name in majorities},
        "story": read_history(run),
    }
    for name, task in metadata["tasks"].items():
        task["contaminated"] = contamination.get(name)
    table = predictions.with_metadata(predictions.score_predictions(records, corpus.tasks), metadata)
    predictions.save(table, out)
    answers.close()
    report = summarise(table)
    write_report(report, out)
    progress({"message": report.summary.sentence, "done": True})
    return report


def _make_scorers(recipe: Recipe, corpus: Corpus, subjects: Sequence[Subject], progress: Progress) -> list[SubjectScorer]:
    """A scorer of each subject on the cluster's free resources, all with one resolved dtype."""
    gpus, split = recipe.training.resources.gpus, recipe.serving.tensor_parallel
    if all(subject.endpoint for subject in subjects):
        gpus, split = 0.0, 1  # they may be served from the very GPUs
    resources = find_free_resources(lambda message: progress({"message": message}), gpus=gpus, tensor_parallel=split)
    recipe = recipe.model_copy(update={"model": resolve_model_dtype(recipe.model, resources)})
    settings = [make_subject_settings(subject, recipe, corpus, on_gpu=resources.gpus > 0) for subject in subjects]
    return [SubjectScorer(*pair, recipe, resources, progress) for pair in zip(subjects, settings, strict=True)]


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


def _judge(
    corpus: Corpus, scorers: Sequence[SubjectScorer], questions: Mapping[PromptKey, Sequence[Record]], records: list[Record]
) -> None:
    """Adds the judge's reward to the record of every generated reply, in place.

    Replies of a subject whose prompts have the same token ids as the first subject's also get their log-ratio to the first subject.
    """
    base = scorers[0]
    recipe, replies = base.recipe, group_replies(records)
    subject = Subject("judge", local_folder(str(recipe.evaluation.judge)))
    if not gives_rewards(subject.folder):
        raise EvaluationError(
            f"evaluation.judge {public_base(str(recipe.evaluation.judge))} is no reward model; name a run with"
            " `training.objective: reward`, or another model that gives an answer a number."
        )
    judge = replace(
        base, subject=subject, settings=make_subject_settings(subject, recipe, corpus, on_gpu=base.resources.gpus > 0)
    ).without_priors()
    layout = judge.settings.answer_settings.layout
    rewarded = judge_questions(_encode(corpus, list(replies), layout, judge.settings.limits), replies, layout)
    for record, reward in judge.value_replies(rewarded):
        record["reward"] = reward
    for scorer in scorers[1:]:
        key = scorer.settings.prompt_key
        if scorer.subject.endpoint or base.subject.endpoint or key != base.settings.prompt_key:
            continue
        own = likelihood_questions(questions[key], replies, scorer.subject.name, scorer.settings.answer_settings.layout)
        # Both are asked in the prompt format of the subject that wrote the replies.
        writer = scorer.without_priors()
        values = writer.value_replies(own), replace(writer, subject=base.subject).value_replies(own)
        counts = {id(record): len(question["choice_ids"][0]) for question, (record,) in own}
        for (record, ours), (_, theirs) in zip(*values, strict=True):
            record |= {"log_ratio": ours - theirs, "reply_tokens": counts[id(record)]}


def _majorities(corpus: Corpus, names: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """Task → its majority answer or None, computed in Ray tasks."""
    work, shared = ray.remote(num_cpus=1)(majority.majority_answer), ray.put(corpus)
    return dict(zip(names, gather_results([work.remote(shared, name) for name in names]), strict=True))


__all__ = ["PARTS", "Subject", "evaluate", "predictions"]
