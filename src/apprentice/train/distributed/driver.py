"""Training driver: starts the stream of rows and the Ray Train workers, follows the run, and exports the best checkpoint.

    driver.py      this process: cluster check, mailbox, trainer, restarts, export
    ray_worker.py  a worker process under Ray Train
    ../worker.py   model, engine and checkpoints in that process
    ../loop.py     the steps

Ray Train restarts the worker group after a failure, at most `training.max_failures` times, from the newest checkpoint. Restarts
with smaller micro-batches, after memory ran out, are not counted.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.data import ExecutionOptions
from ray.train import ValidationConfig
from ray.train.torch import TorchConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from apprentice.data.run_length import positions_of_epochs
from apprentice.data.stream import Corpus, estimate_steps, validation_rows
from apprentice.data.window import WindowRenderer
from apprentice.errors import TrainingError, all_causes
from apprentice.models.loading import count_parameters, resolve_dtype
from apprentice.models.weights.splitter import find_split_obstacle
from apprentice.pretrained.hub import local_folder
from apprentice.ray_cluster.autoscaler import request_nodes
from apprentice.ray_cluster.nodes import node_resources
from apprentice.recipe import Recipe
from apprentice.run.fence import FenceToken, Lease, lease_run
from apprentice.run.folder import Run
from apprentice.run.identity import public_base
from apprentice.run.time_ledger import TimeLedger
from apprentice.train.batch import PackedRows
from apprentice.train.checkpoint import format as checkpoints
from apprentice.train.checkpoint.model_export import export_model
from apprentice.train.distributed.async_validation import CheckpointValidator, Score, validates_asynchronously
from apprentice.train.distributed.compat import CHECKPOINT_SNAPSHOT, PolicyTrainer
from apprentice.train.distributed.elastic import DivisorPolicy
from apprentice.train.distributed.failure import find_apprentice_error, is_lost_connection, is_memory_shortage
from apprentice.train.distributed.follower import Follower, get_outcome
from apprentice.train.distributed.mailbox import Mailbox, RunOutcome
from apprentice.train.distributed.ray_worker import WorkerJob, work
from apprentice.train.distributed.resources import (
    check_resources,
    export_memory,
    has_resources,
    required_resources,
    workers_that_fit,
)
from apprentice.train.distributed.row_streams.lane_streams import LaneConfig, LaneStreams, stream_options
from apprentice.train.distributed.score_reference import compute_references, compute_teacher
from apprentice.train.distributed.validation_task import ValidationTask
from apprentice.train.memory.measure import estimate_of_finished_run
from apprentice.train.memory.model_size import measure_model_size
from apprentice.train.metrics.backends import open_backends
from apprentice.train.metrics.samples import SampleReplies
from apprentice.train.metrics.time_keeper import TimeKeeper
from apprentice.train.metrics.tracker import Tracker
from apprentice.train.on_policy.writer_engine import choose_writer_engine, describe_writers
from apprentice.train.state import Goal
from apprentice.train.worker_config import WorkerConfig

COLLECTIVES_GRACE_S = 10  # collectives time out so much after `hang_timeout_s`, so that a silent worker is named and ended first
START_TIMEOUT_S = "600"  # for a worker group; with Ray Train's 60 s, a busy machine would start one again and again
LEAST_VALIDATION_ROWS, MOST_VALIDATION_ROWS = 8, 256


@dataclass(frozen=True)
class TrainResult:
    """Result of a finished training.

    `tokens_per_s` and `wait_share` (share of the time spent waiting for rows) are of the steps of this call, without the first step
    of each attempt. `peak_memory` is in bytes, the largest of all workers; `expected_memory` is the estimate of `check` for it.
    `validation_loss` and `exported_step` are those of the exported checkpoint, the other figures those of the last.
    """

    steps: int
    loss: float
    validation_loss: float | None
    tokens: int
    target_tokens: int
    tokens_per_s: float
    wait_share: float
    restarts: int
    exported_step: int
    peak_memory: int | None = None
    expected_memory: int | None = None


def train(
    recipe: Recipe, run: Run, corpus: Corpus, *, progress: Callable[[dict[str, Any]], None], score: Score | None = None
) -> TrainResult:
    """Fine-tunes as `recipe` says, from the newest whole checkpoint of `run` if there is one, and exports the best checkpoint.

    Ray must be running. `progress` is called in this process, from a thread, with a dict for each

    step        attempt, step, steps, loss, learning_rate, grad_norm, tokens, target_tokens, seconds, tokens_per_s, eta_s (seconds),
                data_wait (share of time), …
    validation  attempt, step, steps, and validation_loss, or with `score` held_out (the mean score) and held_out_tasks
    other news  attempt, step, steps, and samples (instruction and reply) or message; before the first worker only message

    `score` gets the model of each checkpoint that is validated asynchronously. A run that is already trained returns its result.
    Raises the `ApprenticeError` that stopped the run, `FencedError` if another process holds it, and `KeyboardInterrupt` on Ctrl-C.
    """
    if run.is_trained and "training" in run.status():
        return TrainResult(**run.status()["training"])

    def tell(message: str) -> None:
        progress({"message": message})

    with lease_run(run.folder, "train", tell=tell) as lease:
        time_keeper = TimeKeeper(TimeLedger.from_status(run.status()))
        with time_keeper.spending("nodes"):
            _find_resources(recipe, tell)
        tracker = Tracker(run, progress, open_backends(recipe, run), lease.is_held, time_keeper)
        return _train(recipe, run, corpus, lease, tracker, score)


def _train(recipe: Recipe, run: Run, corpus: Corpus, lease: Lease, tracker: Tracker, score: Score | None) -> TrainResult:
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_TIMEOUT_S)
    # Twice ours, so that a silent worker is first named and ended here.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(2 * recipe.training.hang_timeout_s)
    goal = make_goal(recipe, corpus)
    checkpoints.delete_leftovers(run.checkpoints)
    newest = checkpoints.find_newest(run.checkpoints)
    attempts = 1
    try:
        is_unfinished = newest is None or goal.reached(newest.state) < 1.0
        if is_unfinished:
            run.update_status(state="training", steps=goal.steps)
        if is_unfinished or checkpoints.find_awaiting_validation(run.checkpoints):  # which reads the same rows
            corpus = _with_frozen_model(recipe, run, corpus, tracker.show)
        if is_unfinished:
            attempts = _fit(recipe, run, corpus, goal, tracker, lease.token, score)
        if checkpoints.find_awaiting_validation(run.checkpoints):
            with tracker.time.spending("validation"):
                _validate_awaiting(recipe, run, corpus, tracker, score)
        with tracker.time.spending("checkpoints"):
            result = _finish(recipe, run, corpus, goal, tracker, lease.token, attempts)
        tracker.write_time("person")
        tracker.close()
        return result
    except BaseException as error:
        with suppress(OSError):  # a full disk may be what the error is about
            if lease.is_held():
                run.update_status(state="failed" if isinstance(error, Exception) else "stopped")
                tracker.write_time("fault" if isinstance(error, Exception) else "person")
        with suppress(OSError):
            tracker.close()
        raise


def make_goal(recipe: Recipe, corpus: Corpus) -> Goal:
    """The goal of the run; where it ends by tokens or epochs, its number of steps is an estimate."""
    training = recipe.training
    steps = training.steps or int(estimate_steps(corpus)["steps"])
    if training.epochs is None:
        return Goal(steps, tokens=training.tokens)
    return Goal(steps, positions=positions_of_epochs(corpus))


def _with_frozen_model(recipe: Recipe, run: Run, corpus: Corpus, progress: Callable[[dict[str, Any]], None]) -> Corpus:
    """The corpus with what the objective's reference or teacher says of its rows, if it has one."""
    aim = recipe.training.aim
    if not aim.reference and not aim.teacher:
        return corpus
    actors = workers_that_fit(recipe, node_resources())
    name = public_base(recipe.training.reference or recipe.model.base)
    if aim.teacher:
        teacher = compute_teacher(recipe, run, corpus, actors)
        targets = sum(len(log_probs.ids) for log_probs in teacher.values())
        progress({"message": f"the teacher, {name}, has given its log-probabilities at {targets:,} tokens"})
        return replace(corpus, teacher=teacher)
    references = compute_references(recipe, run, corpus, actors)
    pairs = sum(len(reference.rows) for reference in references.values())
    progress({"message": f"the reference, {name}, has given its log-probabilities of {pairs:,} pairs"})
    return replace(corpus, reference=references)


def _requested_shares(corpus: Corpus) -> dict[int, float]:
    shares = corpus.plan.shares
    return {number: float(shares[task.name]) for number, task in enumerate(corpus.tasks) if task.name in shares}


def _find_resources(recipe: Recipe, tell: Callable[[str], None]) -> None:
    """Returns when the cluster has what training needs: it has it, or its autoscaler adds it. Raises `ResourcesError` else."""
    dtype = resolve_dtype(recipe.model.dtype, "cuda" if recipe.training.resources.gpus else "cpu")
    request = required_resources(recipe, count_parameters(local_folder(recipe.model.base)), dtype)
    request_nodes(request.bundles(), partial(has_resources, request), tell)
    check_resources(request, node_resources())
    if recipe.training.aim.rounds and (request.gpus or recipe.serving.tensor_parallel > 1):
        tell(describe_writers(recipe, choose_writer_engine(recipe)))


def _validation_task(recipe: Recipe, run: Run, corpus: Corpus, score: Score | None) -> ValidationTask:
    """The asynchronous validation of this run."""
    rows = PackedRows.from_columns(validation_rows(corpus, count_validation_rows(recipe)))
    return ValidationTask(CheckpointValidator(recipe, rows, _row_length(corpus), score), run, recipe.training.resources)


def _validate_awaiting(recipe: Recipe, run: Run, corpus: Corpus, tracker: Tracker, score: Score | None) -> None:
    """Validates the checkpoints whose asynchronous validation was cut off or never began."""

    def report(step: int, figures: dict[str, Any]) -> None:
        tracker.write({"attempt": 0, "step": step, "steps": step, **figures})

    try:
        _validation_task(recipe, run, corpus, score).validate_awaiting(report)
    except ray.exceptions.RayError as error:
        raise find_apprentice_error(error) or error from None


def _row_length(corpus: Corpus) -> int:
    """Tokens of a packed row, on both sides of an encoder-decoder."""
    return corpus.row_length + (corpus.target_length or 0)


def _fit(recipe: Recipe, run: Run, corpus: Corpus, goal: Goal, tracker: Tracker, token: FenceToken, score: Score | None) -> int:
    """Runs worker groups until the goal is reached. Returns the number of attempts."""
    workers = workers_that_fit(recipe, node_resources())
    is_async = validates_asynchronously(recipe, node_resources(), lambda message: tracker.show({"message": message}))
    # On this node, since nodes of workers may be lost. A call that the network lost is repeated; a mailbox that died is not
    # restarted, since its state is lost.
    on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": on_this_node, "max_restarts": 0, "max_task_retries": -1}
    mailbox: Any = ray.remote(Mailbox).options(**options).remote(workers)
    rows = validation_rows(corpus, 0 if is_async else count_validation_rows(recipe))
    config = WorkerConfig(
        recipe,
        run,
        goal,
        row_length=_row_length(corpus),
        requested_shares=_requested_shares(corpus),
        samples=SampleReplies(corpus.layout, recipe.training.sample_instructions),
        async_validation=is_async,
    )
    job = WorkerJob(config, mailbox, ray.put(corpus), ray.put(rows), token)
    validation = _validation_task(recipe, run, corpus, score).config(mailbox) if is_async else None
    trainer = _trainer(job, stream_options(recipe, corpus.row_bytes), validation)
    # Ray Train would look for the checkpoints of an earlier call; `checkpoints.find_newest` decides where to go on.
    with suppress(OSError):
        (run.checkpoints / CHECKPOINT_SNAPSHOT).delete()
    failure: BaseException | None = None
    with Follower(mailbox, tracker, recipe.training.hang_timeout_s):
        earlier_handler = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit()
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and not trainer.stopped:
                raise
            failure = error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, earlier_handler)  # Ray Train leaves its own handler behind
    outcome = get_outcome(mailbox)
    ray.kill(mailbox)
    if outcome.error is not None:
        raise outcome.error
    if trainer.stopped:
        raise KeyboardInterrupt
    if failure is not None:
        raise _error_to_raise(failure, outcome) from failure
    return outcome.attempts


def _trainer(job: WorkerJob, options: ExecutionOptions, validation: ValidationConfig | None) -> PolicyTrainer:
    recipe, run, training = job.config.recipe, job.config.run, job.config.recipe.training
    resources = {"CPU": training.resources.cpus} | ({"GPU": training.resources.gpus} if training.resources.gpus else {})
    streams = LaneStreams(recipe, run, job.mailbox, job.corpus, int(job.config.async_validation))
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    run_config: Any = ray.train.RunConfig  # its type hints are those of Ray Train V1
    scaling = ray.train.ScalingConfig(
        num_workers=training.max_workers, use_gpu=training.resources.gpus > 0, resources_per_worker=resources
    )
    return PolicyTrainer(
        partial(work, job),  # not as train_loop_config, which Ray Train's controller would unpack
        policy=DivisorPolicy(scaling, recipe, job.mailbox),
        is_free=is_memory_shortage,
        scaling_config=scaling,
        run_config=run_config(
            name=run.checkpoints.name,
            storage_path=str(run.folder),
            failure_config=ray.train.FailureConfig(max_failures=training.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
        validation_config=validation,
        torch_config=TorchConfig(timeout_s=math.ceil(training.hang_timeout_s) + COLLECTIVES_GRACE_S),
        datasets=streams.datasets(),
        dataset_config=LaneConfig(recipe.lanes, options, training.sequence_parallel),
    )


def count_validation_rows(recipe: Recipe) -> int:
    """Most packed validation rows: an eighth of the rows trained on between two checkpoints, which takes about 5% of the time.

    0 for an on-policy run: its loss is defined only for replies that it wrote itself.
    """
    training = recipe.training
    if training.aim.rounds:
        return 0
    rows = training.checkpoint.every_steps * training.global_batch // 8
    return min(max(rows, training.global_batch, LEAST_VALIDATION_ROWS), MOST_VALIDATION_ROWS)


def _error_to_raise(failure: BaseException, outcome: RunOutcome) -> BaseException:
    """The error to raise for `failure`.

    That is the `ApprenticeError` inside it, a `TrainingError` with a remedy if workers died, or else the worker's own exception.
    """
    ours = find_apprentice_error(failure)
    if ours is not None:
        return ours
    if any(isinstance(error, ray.exceptions.RayActorError) or is_lost_connection(error) for error in all_causes(failure)):
        times = "once" if outcome.attempts == 1 else f"{outcome.attempts} times"
        died = f"{outcome.silent[-1]}; " if outcome.silent else "a worker died, and "
        return TrainingError(
            f"{died}the run had been started {times}; look for a lack of memory or a lost node, then run the same"
            " command again: it goes on from the newest checkpoint."
        )
    failures = getattr(failure, "worker_failures", {})
    return next((error for error in failures.values() if isinstance(error, Exception)), failure)


def _finish(
    recipe: Recipe, run: Run, corpus: Corpus, goal: Goal, tracker: Tracker, token: FenceToken, attempts: int
) -> TrainResult:
    token.check()
    last, best = checkpoints.find_newest(run.checkpoints), checkpoints.find_best(run.checkpoints)
    if last is None or best is None:
        raise TrainingError(
            f"training is over, but no checkpoint in {run.checkpoints} can be read, so there is nothing to export; mend what the"
            " warnings above say of them and give the same command again, or train anew with --restart."
        )
    if goal.reached(last.state) < 1.0:
        raise TrainingError(
            f"training is over, but the newest checkpoint in {run.checkpoints} that can be read is that of step {last.state.step};"
            " give the same command again: it goes on from there."
        )
    checkpoints.prune(run.checkpoints, recipe.training.checkpoint.keep, last)  # some may have been kept until they were validated
    state = last.state
    names = [task.name for task in corpus.tasks]
    shares = {name: float(share) for name, share in corpus.plan.shares.items()}
    rows = {name: len(index.train) for name, index in corpus.indices.items()}
    means = {name: index.mean_target_tokens for name, index in corpus.indices.items()}
    left_out = {name: {**index.rejects, **index.filtered} for name, index in corpus.indices.items()}
    run.ledger_file.write_json(state.ledger.report(names, shares, rows, means, left_out))
    run.update_status(state="exporting")
    probe = WindowRenderer(corpus).probe(max(lane.window for lane in last.state.lanes) + 1)
    # In a process of its own, so that its memory is freed.
    task: Any = ray.remote(export_model)
    base, dtype = local_folder(recipe.model.base), resolve_dtype(best.facts["dtype"])
    largest = measure_model_size(recipe, dtype).largest_module if find_split_obstacle(base) is None else None
    memory = export_memory(count_parameters(base), dtype, node_resources(), largest=largest)
    options = {"num_cpus": 1, "memory": memory, "max_retries": 0}
    exporting = task.options(**options).remote(recipe, run, best, corpus.layout, probe, token)
    peaks = tracker.memory and tracker.memory | {
        "expected": round(estimate_of_finished_run(recipe, _row_length(corpus), tracker.memory).total)
    }
    try:
        ray.get(exporting)
    except ray.exceptions.RayError as error:
        raise find_apprentice_error(error) or error from None
    result = TrainResult(
        steps=state.step,
        loss=state.loss,
        validation_loss=best.state.validation_loss,
        tokens=state.tokens,
        target_tokens=state.target_tokens,
        tokens_per_s=tracker.tokens / tracker.seconds if tracker.seconds else 0.0,
        wait_share=tracker.waited / tracker.seconds if tracker.seconds else 0.0,
        restarts=attempts - 1,
        exported_step=best.state.step,
        **({"peak_memory": peaks["peak"], "expected_memory": peaks["expected"]} if peaks else {}),
    )
    at = {"step": state.step, "steps": state.step, "loss": state.loss}
    exported = {"validation_loss": best.state.validation_loss, "validated_step": best.state.step}
    run.update_status(state="trained", **at, **exported, training=asdict(result))
    return result
