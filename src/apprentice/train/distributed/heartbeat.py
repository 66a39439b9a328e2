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
from ray.train.v2._internal.execution.context import get_train_context
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from apprentice.errors import TrainingError

LONGEST_S = 2.0  # between two heartbeats, at most
SIGNS = 5  # heartbeats within the time after which a worker counts as silent


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
        self._who = WorkerProcess(rank, os.getpid(), context.get_node_id(), ray.util.get_node_ip_address())
        self._mailbox = mailbox
        self._attempt = attempt
        self._every_s = min(LONGEST_S, timeout_s / SIGNS)
        self._patience_s = timeout_s / 2  # for one heartbeat's answer, which may be lost on the network
        self._wishes = 0  # checkpoint requests that the mailbox has counted
        self._granted = 0  # those that were passed on to the loop
        self._preemption: object = None  # the newest notice that was passed on to the loop
        self._over = threading.Event()
        self._alone = False  # true once the mailbox has died
        self._thread = threading.Thread(target=self._beat, name="apprentice-pulse", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while True:
            try:
                self._wishes = ray.get(self._mailbox.beat.remote(self._attempt, self._who), timeout=self._patience_s)
            except ray.exceptions.ActorDiedError:
                self._alone = True
                return
            except ray.exceptions.RayError:
                pass  # most likely of the network and temporary: the next heartbeat may arrive
            if self._over.wait(self._every_s):
                return

    def checkpoint_wanted(self) -> bool:
        """Whether a checkpoint is wanted after this step. Each request is reported once, and only on the first worker.

        Raises `TrainingError` once the mailbox has died, since nobody would notice a hanging worker any more.
        """
        if self._alone:
            raise TrainingError("nobody follows this run any more; give the same command again: it goes on where it was.")
        if self._who.rank > 0:
            return False
        # Not ray.train.get_preemption_info, which waits for all workers; the loop gathers their answers itself.
        notice = get_train_context().preemption_context.preemption_info
        wanted = self._wishes > self._granted or notice not in (None, self._preemption)
        self._granted, self._preemption = self._wishes, notice
        return wanted

    def close(self) -> None:
        """Ends the thread and tells the mailbox that the worker ends normally."""
        self._over.set()
        self._thread.join()
        self._mailbox.leave.remote(self._who.rank)


def end(who: WorkerProcess) -> None:
    """Kills (SIGKILL) the process of a worker that does not answer, from a Ray task on its node."""
    there = NodeAffinitySchedulingStrategy(who.node, soft=False)
    ray.remote(_kill).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(who.process)


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
