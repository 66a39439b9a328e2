"""What goes between a worker and the mailbox besides records: signs of life one way, and the wish for a checkpoint the other.

A checkpoint is wanted before the run grows, and at once when a node of the run is about to be taken away. Knows Ray; nothing of
how a step or a checkpoint is made.
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

LONGEST_S = 2.0  # between two signs
SIGNS = 5  # within the time after which a worker counts as silent


class Who(NamedTuple):
    """A worker's process."""

    rank: int
    process: int
    node: str  # Ray's id of it
    address: str

    def __str__(self) -> str:
        return f"worker {self.rank} (process {self.process} on {self.address})"


class Pulse:
    """A thread of a worker of one attempt that tells `mailbox` that the worker is there."""

    def __init__(self, mailbox: Any, attempt: int, rank: int, timeout_s: float) -> None:
        context = ray.get_runtime_context()
        self._who = Who(rank, os.getpid(), context.get_node_id(), ray.util.get_node_ip_address())
        self._mailbox = mailbox
        self._attempt = attempt
        self._every_s = min(LONGEST_S, timeout_s / SIGNS)
        self._patience_s = timeout_s / 2  # with one sign: an answer that was lost on the way would be waited for without end
        self._wishes = 0  # for a checkpoint that the mailbox has heard
        self._granted = 0
        self._preemption: object = None  # the notice that a checkpoint was made for
        self._over = threading.Event()
        self._alone = False  # nobody listens any more
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
                pass  # the network's, most likely, and it passes: the next sign may arrive
            if self._over.wait(self._every_s):
                return

    def checkpoint_wanted(self) -> bool:
        """Whether one is wanted after this step; the same wish is told once, and by the first worker.

        Raises `TrainingError` once the mailbox has died: nobody would notice any more if a worker hung.
        """
        if self._alone:
            raise TrainingError("nobody follows this run any more; give the same command again: it goes on where it was.")
        if self._who.rank > 0:
            return False
        # Not ray.train.get_preemption_info, which waits for all workers at an actor; the loop puts their answers together itself.
        notice = get_train_context().preemption_context.preemption_info
        wanted = self._wishes > self._granted or notice not in (None, self._preemption)
        self._granted, self._preemption = self._wishes, notice
        return wanted

    def close(self) -> None:
        """The worker ends of itself."""
        self._over.set()
        self._thread.join()
        self._mailbox.leave.remote(self._who.rank)


def end(who: Who) -> None:
    """Kills the process of a worker that does not answer, from a task on its node: it would not hear anything milder."""
    there = NodeAffinitySchedulingStrategy(who.node, soft=False)
    ray.remote(_kill).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(who.process)


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
