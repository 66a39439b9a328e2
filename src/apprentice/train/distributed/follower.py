"""Follower: a driver thread that takes records from the mailbox to the tracker, and kills workers without a heartbeat."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import ray

from apprentice.errors import TrainingError
from apprentice.train.distributed.heartbeat import WorkerProcess, kill_worker
from apprentice.train.distributed.mailbox import RunOutcome
from apprentice.train.metrics.tracker import Tracker

POLL_S = 0.2  # between two rounds
LAST_TRIES = 25  # rounds at the end to get the last records
_log = logging.getLogger(__name__)


class Follower:
    """A thread, inside `with`, that works while the main thread waits for Ray Train. It ends early only if the mailbox dies.

    A call that the network lost is repeated in the next round; a record that cannot be written is logged and skipped.
    """

    def __init__(self, mailbox: Any, tracker: Tracker, hang_timeout_s: float) -> None:
        self._mailbox = mailbox
        self._tracker = tracker
        self._hang_timeout_s = hang_timeout_s
        self._taken = 0  # records taken
        self._killed: set[WorkerProcess] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="apprentice-progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        try:
            while not self._over.wait(POLL_S):
                self._pass_on()
                self._tracker.keep_time()
            for _ in range(LAST_TRIES):
                if self._pass_on():
                    return
                time.sleep(POLL_S)
        except ray.exceptions.ActorDiedError:
            return  # `get_outcome` reports it, and the workers end by themselves

    def _pass_on(self) -> bool:
        """Makes one round: kills silent workers, passes records on. False if a call was lost on the network."""
        try:
            for worker in ray.get(self._mailbox.find_silent_workers.remote(self._hang_timeout_s)):
                if worker not in self._killed:
                    self._killed.add(worker)
                    kill_worker(worker)
            records = ray.get(self._mailbox.take_records.remote(self._taken))
        except ray.exceptions.ActorDiedError:
            raise
        except ray.exceptions.RayError as error:
            _log.warning("the figures of the run did not arrive (%s); they are asked for again", error)
            return False
        self._taken += len(records)
        for record in records:
            try:
                self._tracker.write(record)
            except Exception:  # a defect here must not cost the run its later records
                _log.exception("a record of step %s could not be written", record.get("step"))
        return True


def get_outcome(mailbox: Any) -> RunOutcome:
    """The outcome of the run as the mailbox has it; if the mailbox died, one with an error that says so."""
    try:
        outcome: RunOutcome = ray.get(mailbox.outcome.remote())
    except ray.exceptions.ActorDiedError:
        lost = TrainingError(
            "the process that gathers the run's figures died, most likely for lack of memory; make room and give the same command"
            " again: it goes on from the newest checkpoint."
        )
        return RunOutcome(1, lost, [])
    return outcome
