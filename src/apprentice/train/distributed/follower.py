"""Follows a running training from its driver: passes its records on, and ends workers that have not answered for too long."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import ray

from apprentice.errors import TrainingError
from apprentice.train.distributed.heartbeat import Who, end
from apprentice.train.metrics.tracker import Outcome, Tracker

POLL_S = 0.2
LAST_TRIES = 25  # to take the last records
_log = logging.getLogger(__name__)


class Follower:
    """A thread that works while the main thread waits for Ray Train. Nothing that it meets ends it but the end of the mailbox.

    A call that the network lost is made again with the next round; a record that cannot be written is told and passed over.
    """

    def __init__(self, mailbox: Any, tracker: Tracker, hang_timeout_s: float) -> None:
        self._mailbox = mailbox
        self._tracker = tracker
        self._hang_timeout_s = hang_timeout_s
        self._seen = 0  # records
        self._ended: set[Who] = set()
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
            for _ in range(LAST_TRIES):
                if self._pass_on():
                    return
                time.sleep(POLL_S)
        except ray.exceptions.ActorDiedError:
            return  # `outcome_of` says so, and the workers end of themselves

    def _pass_on(self) -> bool:
        """One round; false where the network did not let it."""
        try:
            for who in ray.get(self._mailbox.silent.remote(self._hang_timeout_s)):
                if who not in self._ended:
                    self._ended.add(who)
                    end(who)
            records = ray.get(self._mailbox.take.remote(self._seen))
        except ray.exceptions.ActorDiedError:
            raise
        except ray.exceptions.RayError as error:
            _log.warning("the figures of the run did not arrive (%s); they are asked for again", error)
            return False
        self._seen += len(records)
        for record in records:
            try:
                self._tracker.write(record)
            except Exception:  # a fault of ours must not cost the run what comes after it
                _log.exception("a record of step %s could not be written", record.get("step"))
        return True


def outcome_of(mailbox: Any) -> Outcome:
    """What the workers left in the mailbox."""
    try:
        outcome: Outcome = ray.get(mailbox.outcome.remote())
    except ray.exceptions.ActorDiedError:
        lost = TrainingError(
            "the process that gathers the run's figures died, most likely for lack of memory; make room and give the same command"
            " again: it goes on from the newest checkpoint."
        )
        return Outcome(1, lost, [])
    return outcome
