"""Worker process under Ray Train: gives `run_worker` its rows, takes its records and checkpoints to Ray, sends heartbeats.

train/worker.py imports the code of all models, so it is imported only after the stream of rows has been started.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import ray
import ray.train
import ray.train.torch
from ray.train import CheckpointUploadMode

from apprentice.recipe import Recipe, Training
from apprentice.run.fence import FenceToken
from apprentice.run.folder import Run
from apprentice.train.batch import PackedRows
from apprentice.train.distributed.failure import find_apprentice_error
from apprentice.train.distributed.heartbeat import Heartbeat
from apprentice.train.engine.deepspeed_config import rows_per_worker
from apprentice.train.state import Goal, State

if TYPE_CHECKING:
    from apprentice.train.checkpoint.format import Checkpoint
    from apprentice.train.metrics.samples import Samples

T = TypeVar("T")
PREFETCHED_STEPS = 2  # batches that Ray Data fetches ahead


@dataclass(frozen=True)
class Job:
    """Arguments of a worker, the same for all."""

    recipe: Recipe
    run: Run
    goal: Goal
    mailbox: Any
    corpus: Any  # Ray object reference
    validation: Any  # Ray object reference to the packed validation rows
    length: int  # tokens of a packed row, on both sides of an encoder-decoder
    row_bytes: int  # bytes of a packed row's arrays
    shares: dict[int, float]  # task number → requested share of the examples
    samples: Samples
    aside: bool  # checkpoints are validated asynchronously, not by the workers
    token: FenceToken  # the right to write to the run


def work(job: Job) -> None:
    """Runs one worker from start to end; the function that Ray Train calls in each worker process."""
    attempt, restored, over = ray.get(job.mailbox.start.remote())
    if over:
        return
    context, training = ray.train.get_context(), job.recipe.training
    heartbeat = Heartbeat(job.mailbox, attempt, context.get_world_rank(), training.hang_timeout_s)
    logging.getLogger("ray").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")  # deprecations inside DeepSpeed and Ray, for their developers

    def tell(record: dict[str, Any]) -> None:
        job.mailbox.put.remote({"attempt": attempt, **record})

    def register(saved: Checkpoint | None, state: State) -> None:
        metrics = {"step": state.step, "loss": state.loss, "validation_loss": state.validation_loss}
        handle = None
        if saved is not None:
            filesystem, path = saved.folder.filesystem()
            handle = ray.train.Checkpoint(path, filesystem)
        validated = job.aside and handle is not None
        ray.train.report(metrics, handle, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD, validation=validated)

    try:
        rows = _rows(training, context.get_world_size())
        from apprentice.data.stream import render_window
        from apprentice.train.worker import run_worker  # the code of all models, imported while the stream starts

        validation = PackedRows.of(ray.get(job.validation))
        device = ray.train.torch.get_device()
        given = (job.recipe, job.run, job.goal, restored, rows, validation, job.length)
        told: dict[str, Any] = {"tell": tell, "register": register, "wanted": heartbeat.checkpoint_wanted}
        told["is_empty"] = lambda window: len(render_window(ray.get(job.corpus), window)["row"]) == 0
        if context.get_world_rank() == 0:
            told["token"] = job.token.start_group(attempt)
        told |= {"shares": job.shares, "samples": job.samples, "validated_aside": job.aside}
        run_worker(*given, device=device, **told)
    except Exception as error:
        # Another attempt would not mend it: its workers see the error in the mailbox and end at once.
        if (ours := find_apprentice_error(error)) is not None:
            ray.get(job.mailbox.fail.remote(ours))
        raise
    finally:
        heartbeat.close()


def _rows(training: Training, workers: int) -> Iterator[PackedRows]:
    """This worker's packed rows; each item holds its rows of one optimizer step."""
    shard = ray.train.get_dataset_shard("train")
    ahead = 0 if training.aim.rounds else PREFETCHED_STEPS
    count = rows_per_worker(training, workers)
    return map(PackedRows.of, begun(shard.iter_batches(batch_size=count, prefetch_batches=ahead, batch_format="numpy")))


def begun(batches: Iterable[T]) -> Iterator[T]:
    """`batches`, the first of which a thread requests at once, so that the stream starts while the model is loaded."""
    iterator = iter(batches)
    pool = ThreadPoolExecutor(1, "apprentice-first-rows")
    first = pool.submit(lambda: list(islice(iterator, 1)))
    pool.shutdown(wait=False)

    def all_of_them() -> Iterator[T]:
        yield from first.result()
        yield from iterator

    return all_of_them()
