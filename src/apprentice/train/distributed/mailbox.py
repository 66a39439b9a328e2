"""Mailbox: a Ray actor with the state that the driver and the workers of a run share.

    workers ── records, errors, heartbeats ──▶ Mailbox ──▶ Follower in the driver
    driver  ── checkpoint to start from, number of workers, request for a checkpoint ──▶ Mailbox ──▶ workers

An attempt is one worker group, from start to end or failure; a mailbox outlives them all. It stamps records with the time of its
node, from which the driver, on the same node, enters the ledger of time. It imports no torch, which takes two seconds and which
it does not need.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from apprentice.errors import ApprenticeError

if TYPE_CHECKING:
    from apprentice.train.checkpoint.format import Checkpoint
    from apprentice.train.distributed.heartbeat import WorkerProcess


class RunOutcome(NamedTuple):
    """Number of worker groups started, the error that ended the run, and a sentence for each worker that was silent."""

    attempts: int
    error: ApprenticeError | None
    silent: list[str]


class Mailbox:
    """State shared by driver and workers, one for each `train()` call."""

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers
        self._requests = 0
        self._is_requested = False
        self._heard: dict[int, tuple[WorkerProcess, float]] = {}  # this attempt's workers by rank: when each was last heard
        self._silent_workers: list[WorkerProcess] = []  # this attempt's silent workers
        self._sentences: list[str] = []
        self._step = (0, 0)  # step of the newest record, and expected steps
        self._stream_cpus = 0.0
        self._largest_micro_batch: int | None = None  # rows at once that have not run out of memory
        self._attempt = 0
        self._is_training = False  # whether the attempt's workers have neither failed nor come to the end
        self._from: Checkpoint | None = None
        self._error: ApprenticeError | None = None
        self._records: list[dict[str, Any]] = []
        self._taken = 0  # records that the driver has received

    def resize(self, workers: int) -> None:
        """Sets the number of workers of the next worker group."""
        if workers != self._workers:
            self.add_message(f"training goes on with {workers} worker{'s' if workers != 1 else ''} instead of {self._workers}")
        self._workers = workers

    def begin_attempt(self, checkpoint: Checkpoint | None) -> int:
        """Begins an attempt: a worker group is about to start from `checkpoint`. Returns its number of workers."""
        self._attempt += 1
        self._from = checkpoint
        self._requests = 0
        self._is_training = True
        self._begin_phase("starting")
        self._clear_workers()
        return self._workers

    def set_stream_cpus(self, cpus: float) -> None:
        """Sets the number of CPUs that the data actors of this attempt hold."""
        self._stream_cpus = cpus

    def stream_cpus(self) -> float:
        """Number of CPUs that the data actors of this attempt hold."""
        return self._stream_cpus

    def forget_workers(self) -> None:
        """Forgets the workers of an attempt that has failed."""
        if self._is_training:
            self._is_training = False
            self._begin_phase("starting", is_fault=True)
        self._clear_workers()

    def wait_for_nodes(self, message: str) -> None:
        """Notes that training waits for nodes from now on, and tells the user so."""
        self._begin_phase("nodes")
        self.add_message(message)

    def _begin_phase(self, phase: str, *, is_fault: bool = False) -> None:
        self._records.append({"phase": phase, "is_fault": is_fault, "at": time.monotonic()})

    def _clear_workers(self) -> None:
        self._heard = {}
        self._silent_workers = []
        self._is_requested = False

    def join(self) -> tuple[int, Checkpoint | None, bool]:
        """First call of a worker: the attempt's number (from 1), the checkpoint to restore, and whether the run has failed."""
        return self._attempt, self._from, self._error is not None

    def record_failure(self, error: ApprenticeError) -> None:
        """Records an error that no further attempt would mend; the first one counts."""
        self._error = self._error or error

    def halve_micro_batch(self, micro: int) -> None:
        """Limits the micro-batch of later attempts to half of `micro` rows, with which a worker ran out of memory."""
        if self._largest_micro_batch is None or self._largest_micro_batch >= micro:
            self._largest_micro_batch = micro // 2
            self.add_message(
                f"a worker ran out of memory with {micro} rows at once; training goes on from its newest checkpoint with"
                f" at most {micro // 2}, the same rows in each step"
            )

    def largest_micro_batch(self) -> int | None:
        """Most packed rows that a micro-batch may have; None where no worker has run out of memory."""
        return self._largest_micro_batch

    def add_record(self, record: dict[str, Any]) -> None:
        """Adds a record of a worker."""
        self._step = (record["step"], record["steps"])
        if "saved_s" in record:  # a checkpoint has been written
            self._is_requested = False
        if "memory" in record:  # the last one of an attempt
            self._is_training = False
        self._records.append(record | {"at": time.monotonic()})

    def add_validation(self, step: int, figures: Mapping[str, Any]) -> None:
        """Adds a record with the validation figures of the checkpoint of `step`, computed outside the workers."""
        self._records.append({"attempt": max(self._attempt, 1), "step": step, "steps": self._step[1] or step, **figures})

    def add_message(self, message: str) -> None:
        """Adds a message for the user, at the current step."""
        step, steps = self._step
        self._records.append({"attempt": self._attempt, "step": step, "steps": steps, "message": message})

    def request_checkpoint(self) -> None:
        """Asks the workers for a checkpoint."""
        self._requests += 1
        self._is_requested = True

    def is_checkpoint_requested(self) -> bool:
        """Whether a checkpoint was requested and none has been written since."""
        return self._is_requested

    def beat(self, attempt: int, worker: WorkerProcess) -> int:
        """Takes a worker's heartbeat. Returns how many checkpoints were requested in this attempt."""
        if attempt == self._attempt and worker not in self._silent_workers:  # a worker that is being ended no longer counts
            self._heard[worker.rank] = (worker, time.monotonic())
        return self._requests

    def leave(self, rank: int) -> None:
        """Takes note that a worker ends normally."""
        self._heard.pop(rank, None)

    def find_silent_workers(self, limit_s: float) -> list[WorkerProcess]:
        """Workers of this attempt without a heartbeat for `limit_s` seconds.

        Each is noted once, but returned by all later calls of the attempt, since an answer may be lost on the network.
        """
        now = time.monotonic()
        for worker in [worker for worker, at in self._heard.values() if now - at > limit_s]:
            del self._heard[worker.rank]
            self._silent_workers.append(worker)
            self._sentences.append(f"{worker} had not answered for {limit_s:g} seconds and was ended")
            self.add_message(self._sentences[-1])
        return self._silent_workers

    def take_records(self, seen: int = 0) -> list[dict[str, Any]]:
        """All records after the first `seen`, which are dropped. A call with the same `seen`, after a lost answer, repeats them."""
        del self._records[: seen - self._taken]
        self._taken = seen
        return self._records

    def outcome(self) -> RunOutcome:
        """The outcome of the run so far."""
        return RunOutcome(self._attempt, self._error, self._sentences)
