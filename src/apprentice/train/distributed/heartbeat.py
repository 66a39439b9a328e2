"""Heartbeats of workers to the mailbox; the replies say whether a checkpoint is requested.

A checkpoint is requested before the run grows. A worker also wants one when Ray announces that a node is about to be taken away.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from apprentice.errors import TrainingError
from apprentice.train.distributed.compat import preemption_notice

LONGEST_PAUSE_S = 2.0  # between two heartbeats, at most
HEARTBEATS_PER_TIMEOUT = 5


class WorkerProcess(NamedTuple):
    """Identity of a worker: rank, process id and node."""

    rank: int
    process: int
    node: str  # its id in Ray
    address: str

    def __str__(self) -> str:
        return f"worker {self.rank} (process {self.process} on {self.address})"


class Heartbeat:
    """Heartbeat thread of a worker in one attempt; starts at once. After `timeout_s` without one the worker counts as silent."""

    def __init__(self, mailbox: Any, attempt: int, rank: int, timeout_s: float) -> None:
        context = ray.get_runtime_context()
        self._worker = WorkerProcess(rank, os.getpid(), context.get_node_id(), ray.util.get_node_ip_address())
        self._mailbox = mailbox
        self._attempt = attempt
        self._every_s = min(LONGEST_PAUSE_S, timeout_s / HEARTBEATS_PER_TIMEOUT)
        self._answer_timeout_s = timeout_s / 2  # for one heartbeat's answer, which may be lost on the network
        self._requests = 0  # checkpoint requests that the mailbox has counted
        self._granted_requests = 0  # those that were passed on to the loop
        self._preemption: object = None  # the newest notice that was passed on to the loop
        self._over = threading.Event()
        self._is_mailbox_dead = False  # true once the mailbox has died
        self._thread = threading.Thread(target=self._beat, name="apprentice-heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while True:
            try:
                self._requests = ray.get(self._mailbox.beat.remote(self._attempt, self._worker), timeout=self._answer_timeout_s)
            except ray.exceptions.ActorDiedError:
                self._is_mailbox_dead = True
                return
            except ray.exceptions.RayError:
                pass  # most likely of the network and temporary: the next heartbeat may arrive
            if self._over.wait(self._every_s):
                return

    def is_checkpoint_requested(self) -> bool:
        """Whether a checkpoint is wanted after this step. Each request is reported once, and only on the first worker.

        Raises `TrainingError` once the mailbox has died, since nobody would notice a hanging worker any more.
        """
        if self._is_mailbox_dead:
            raise TrainingError("nobody follows this run any more; give the same command again: it goes on where it was.")
        if self._worker.rank > 0:
            return False
        notice = preemption_notice()
        is_requested = self._requests > self._granted_requests or notice not in (None, self._preemption)
        self._granted_requests, self._preemption = self._requests, notice
        return is_requested

    def close(self) -> None:
        """Ends the thread and tells the mailbox that the worker ends normally."""
        self._over.set()
        self._thread.join()
        self._mailbox.leave.remote(self._worker.rank)


def kill_worker(worker: WorkerProcess) -> None:
    """Kills (SIGKILL) the process of a worker that does not answer, from a Ray task on its node."""
    node = NodeAffinitySchedulingStrategy(worker.node, soft=False)
    ray.remote(_kill).options(num_cpus=0, max_retries=0, scheduling_strategy=node).remote(worker.process)


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
