"""TimeKeeper: enters the wall time of one `train()` call into the run's ledger of time, in the driver.

Records come with `at`, seconds of the monotonic clock of the driver's node, where the mailbox stamps them. Between two of them the
time belongs to what was going on:

    starting ─▶ step ─▶ step ─▶ validation ─▶ (checkpoint) ─▶ step ─▶ group ended: (lost) ─▶ starting ─▶ step …

A step's record tells its seconds, and how many of them were spent waiting for rows; what lies between its begin and the record
before it is the checkpoint's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from apprentice.run.time_ledger import TimeLedger

RUNNING = "running"


class TimeKeeper:
    """Follows one call from now on. `ledger` is the run's so far, None for a new run.

    The time since the ledger's last entry counts as stopped if a person ended the run then, else as down. `clock` and `wall`, in
    seconds, may be set in tests.
    """

    def __init__(
        self, ledger: TimeLedger | None, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self.ledger = ledger or TimeLedger()
        self._clock = clock
        self._entered = clock()  # all before it is entered
        self._wall_offset = wall() - self._entered
        self._phase = "starting"
        if ledger is not None:
            self.ledger.enter("stopped" if ledger.end == "person" else "down", self._wall_offset + self._entered - ledger.at)
            self.ledger.faults += ledger.end == ""
        self._save_point("")

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Enters the time inside as `kind`, and what comes after it as before."""
        phase = self._phase
        self.switch(kind)
        try:
            yield
        finally:
            self.switch(phase)

    def switch(self, phase: str, at: float | None = None, *, is_fault: bool = False) -> None:
        """Ends what is going on at `at` (now, if None), and begins `phase`, a kind of the ledger.

        With `is_fault`, a worker group has failed: the step that it was in is lost.
        """
        self.ledger.faults += is_fault
        if self._phase == RUNNING:
            self._enter("lost_steps" if is_fault else phase, at)
        else:
            self._enter(self._phase, at)
        self._phase = phase
        self._save_point("")

    def take(self, record: dict[str, Any]) -> bool:
        """Takes the `at` out of a record and enters its time. True if the record is a change of phase, and nothing else."""
        at = record.pop("at", None)
        if "phase" in record:
            self.switch(record["phase"], at, is_fault=record.get("is_fault", False))
            return True
        if at is None:
            return False  # computed outside the workers
        if "loss" in record:
            self._take_step(record, at)
        elif "validation_loss" in record or "samples" in record:
            self._enter("validation", at)
        elif "saved_s" in record:
            self.ledger.begin_block()
        elif "memory" in record:  # the loop has ended
            self.switch("checkpoints", at)
        self._save_point("")
        return False

    def _take_step(self, record: dict[str, Any], at: float) -> None:
        begin = at - record["seconds"]
        if self._phase == RUNNING:
            self._enter("checkpoints", begin)
            self._enter("data", begin + record["data_wait_s"])
        else:  # the first rows of a worker group come when the stream has started
            self._enter(self._phase, begin + record["data_wait_s"])
            self.ledger.go_back(record["step"] - 1)
        self._phase = RUNNING
        self.ledger.enter_step(record["step"], max(0.0, at - self._entered))
        self._entered = max(self._entered, at)

    def pass_time(self) -> None:
        """Enters the time until now, if no step is being made: it is known only afterwards how long one took."""
        if self._phase != RUNNING:
            self._enter(self._phase, None)
            self._save_point("")

    def end(self, end: str) -> None:
        """Ends the call, by a "person" (who stopped it, or whose goal is reached) or a "fault"; enters all time until now."""
        self._enter("lost_steps" if self._phase == RUNNING else self._phase, None)
        self.ledger.faults += end == "fault"
        self._save_point(end)

    def _enter(self, kind: str, at: float | None) -> None:
        at = self._clock() if at is None else at
        self.ledger.enter(kind, at - self._entered)
        self._entered = max(self._entered, at)

    def _save_point(self, end: str) -> None:
        self.ledger.at, self.ledger.end = self._wall_offset + self._entered, end
