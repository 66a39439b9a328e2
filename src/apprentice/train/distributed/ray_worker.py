"""Worker process under Ray Train: gives `run_worker` its rows, takes its records and checkpoints to Ray, sends heartbeats.

train/worker.py imports the code of all models, so it is imported only after the stream of rows has been started.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import ray.train.torch
from ray.train import CheckpointUploadMode

from apprentice.errors import DamagedError
from apprentice.run.fence import FenceToken
from apprentice.train.batch import PackedRows
from apprentice.train.distributed.failure import find_apprentice_error
from apprentice.train.distributed.heartbeat import Heartbeat
from apprentice.train.distributed.row_streams.lane_reader import read_rows
from apprentice.train.metrics.mixture_ledger import DropCounts
from apprentice.train.state import State
from apprentice.train.worker_config import MicroBatchTooLargeError, WorkerConfig

if TYPE_CHECKING:
    from apprentice.train.checkpoint.format import Checkpoint


@dataclass(frozen=True)
class WorkerJob:
    """Arguments of `work`, the same for all workers."""

    config: WorkerConfig
    mailbox: Any  # Ray actor
    corpus: Any  # Ray object reference
    validation: Any  # Ray object reference to the packed validation rows
    token: FenceToken  # the right to write to the run


class _RayEvents:
    """Events of a worker: records go to the mailbox, checkpoints to Ray Train."""

    def __init__(self, job: WorkerJob, attempt: int, heartbeat: Heartbeat) -> None:
        self._job = job
        self._attempt = attempt
        self._heartbeat = heartbeat

    def record(self, figures: dict[str, Any]) -> None:
        self._job.mailbox.add_record.remote({"attempt": self._attempt, **figures})

    def register_checkpoint(self, checkpoint: Checkpoint | None, state: State) -> None:
        metrics = {"step": state.step, "loss": state.loss, "validation_loss": state.validation_loss}
        handle = None
        if checkpoint is not None:
            filesystem, path = checkpoint.folder.filesystem()
            handle = ray.train.Checkpoint(path, filesystem)
        validation = self._job.config.async_validation and handle is not None
        ray.train.report(metrics, handle, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD, validation=validation)

    def is_checkpoint_requested(self) -> bool:
        return self._heartbeat.is_checkpoint_requested()

    def empty_window_drops(self, window: int) -> DropCounts | None:
        from apprentice.data.stream import empty_window_drops

        return empty_window_drops(ray.get(self._job.corpus), window)


def work(job: WorkerJob) -> None:
    """Runs one worker from start to end; the function that Ray Train calls in each worker process."""
    attempt, restored, has_failed = ray.get(job.mailbox.join.remote())
    if has_failed:
        return
    context, training = ray.train.get_context(), job.config.recipe.training
    heartbeat = Heartbeat(job.mailbox, attempt, context.get_world_rank(), training.hang_timeout_s)
    logging.getLogger("ray").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")  # deprecations inside DeepSpeed and Ray, for their developers
    try:
        rows = read_rows(job.config.recipe, context.get_world_rank(), context.get_world_size())
        from apprentice.model_pool.device import reserved_device
        from apprentice.train.worker import run_worker  # the code of all models, imported while the stream starts

        reserved_device(training.resources.gpus)  # Ray's `get_device` is the CPU where PyTorch sees no GPU

        validation = PackedRows.from_columns(ray.get(job.validation))
        token = job.token.start_group(attempt) if context.get_world_rank() == 0 else None
        events = _RayEvents(job, attempt, heartbeat)
        config = replace(job.config, largest_micro_batch=ray.get(job.mailbox.largest_micro_batch.remote()))
        run_worker(config, restored, rows, validation, events, device=ray.train.torch.get_device(), token=token)
    except MicroBatchTooLargeError as error:
        # A step cannot be done again in place: the other workers wait in its collectives. So a new group starts, with fewer rows.
        ray.get(job.mailbox.halve_micro_batch.remote(error.micro))
        raise
    except Exception as error:
        # Another attempt would not mend it: its workers see the error in the mailbox and end at once.
        # But after a damaged checkpoint it goes on from the one before.
        if (ours := find_apprentice_error(error)) is not None and not isinstance(ours, DamagedError):
            ray.get(job.mailbox.record_failure.remote(ours))
        raise
    finally:
        heartbeat.close()
