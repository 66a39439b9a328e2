"""What a running training tells its driver, and where the driver writes it.

    worker of rank 0 ──▶ Mailbox (a Ray actor) ──▶ Tracker in the driver ──▶ steps.jsonl, TensorBoard events, status.json, progress

The mailbox also carries the one decision from which checkpoint an attempt goes on, and the first error that the user can mend.
Knows nothing of models or of how a step is made.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apprentice.artifacts import Run
from apprentice.errors import ApprenticeError
from apprentice.train.events import Events

if TYPE_CHECKING:  # it brings torch, two seconds that the mailbox need not wait for
    from apprentice.train.checkpoint import Checkpoint

STATUS_EVERY_S = 2.0
SCALARS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_s": "speed/tokens_per_s",
    "data_wait": "speed/data_wait",
    "validation_loss": "validation/loss",
    **{name: f"preference/{name}" for name in ("accuracy", "margin", "chosen_reward", "rejected_reward")},
}


class Mailbox:
    """One per `train()` call, as a Ray actor; it outlives the workers."""

    def __init__(self) -> None:
        self._attempt = 0
        self._from: Checkpoint | None = None
        self._error: ApprenticeError | None = None
        self._records: list[dict[str, Any]] = []

    def begin(self, checkpoint: Checkpoint | None) -> None:
        """A worker group is about to start from `checkpoint`."""
        self._attempt += 1
        self._from = checkpoint

    def start(self) -> tuple[int, Checkpoint | None, bool]:
        """What a worker asks first: number of the attempt (from 1), where it goes on, and whether all is over already."""
        return self._attempt, self._from, self._error is not None

    def fail(self, error: ApprenticeError) -> None:
        """An error that no further attempt would mend."""
        self._error = self._error or error

    def put(self, record: dict[str, Any]) -> None:
        self._records.append(record)

    def take(self) -> list[dict[str, Any]]:
        """The records since the last call."""
        taken, self._records = self._records, []
        return taken

    def outcome(self) -> tuple[int, ApprenticeError | None]:
        """Number of attempts, and the error that ended the run."""
        return self._attempt, self._error


class Tracker:
    """Writes records in the driver; also adds up the speed of steady steps (the first of an attempt warms up)."""

    def __init__(self, run: Run, progress: Callable[[dict[str, Any]], None]) -> None:
        self._run = run
        self._progress = progress
        self._file = run.folder / "steps.jsonl"
        self._scratch = None if run.folder.is_local else tempfile.TemporaryDirectory()
        earlier = self._file.read_text().splitlines() if self._file.exists() else []
        self._lines = earlier if self._scratch is not None else []  # not written yet
        self._earlier_attempts = json.loads(earlier[-1])["attempt"] if earlier else 0
        folder = run.events.local if self._scratch is None else Path(self._scratch.name)
        self._events: Events | None = Events(folder)
        self._events_folder = folder
        self._told = False  # that the disk is full
        self._status_at = 0.0
        self._warm: set[int] = set()
        self.tokens = 0
        self.seconds = 0.0
        self.waited = 0.0

    def write(self, record: dict[str, Any]) -> None:
        """Takes a step (with `loss`) or a validation (with `validation_loss`) and shows it to `progress`.

        Attempts are counted on over all calls that went on with the run. A full disk is told once and stops nothing: lines wait for
        room, the status and the events of meanwhile are lost.
        """
        record = record | {"attempt": record["attempt"] + self._earlier_attempts}
        self._lines.append(json.dumps(record))
        if "loss" in record:
            self._count(record)
        for put in (self._write_lines, lambda: self._draw(record), lambda: self._update_status(record)):
            try:
                put()
            except OSError as error:
                self._tell_once(error)
        self._progress({key: value for key, value in record.items() if key != "examples"})

    def _write_lines(self) -> None:
        """Appends the lines that wait, all or none."""
        if self._scratch is not None:
            return
        file = self._file.local
        size = file.stat().st_size if file.exists() else 0
        try:
            with file.open("a", encoding="utf-8") as stream:
                stream.writelines(f"{line}\n" for line in self._lines)
        except OSError:
            with suppress(OSError):
                os.truncate(file, size)
            raise
        self._lines.clear()

    def _draw(self, record: dict[str, Any]) -> None:
        if self._events is None:
            return
        try:
            for key, name in SCALARS.items():
                if record.get(key) is not None:
                    self._events.add(name, record[key], record["step"])
        except OSError:
            self._events.give_up()
            self._events = None  # half an event may be in the file: nothing that comes after it would be read
            raise

    def _tell_once(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            reason = error.strerror or error
            self._progress({"message": f"{self._run.folder} cannot be written to ({reason}); make room there. Training goes on."})

    def _count(self, record: dict[str, Any]) -> None:
        if record["attempt"] in self._warm:
            self.tokens += record["tokens"]
            self.seconds += record["seconds"]
            self.waited += record["data_wait_s"]
        self._warm.add(record["attempt"])

    def _update_status(self, record: dict[str, Any]) -> None:
        if time.monotonic() - self._status_at < STATUS_EVERY_S and record["step"] < record["steps"]:
            return
        self._status_at = time.monotonic()
        known = {key: record[key] for key in ("step", "steps", "loss", "validation_loss") if record.get(key) is not None}
        self._run.update_status(state="training", **known)

    def close(self) -> None:
        """Raises `OSError` where there is no room for the last lines."""
        if self._events is not None:
            events, self._events = self._events, None
            events.close()
        self._write_lines()
        if self._scratch is not None:
            self._file.write_text("".join(line + "\n" for line in self._lines))
            self._run.events.upload(self._events_folder)
            self._scratch.cleanup()
