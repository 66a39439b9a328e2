"""Tracker: writes the records of a running training, in the driver.

worker of rank 0 ──▶ Mailbox (a Ray actor) ──▶ Tracker ──┬─▶ steps.jsonl, TensorBoard events, status.json (and in it the ledger
                                                         │   of time)
                                                         ├─▶ progress: the lines on the screen
                                                         └─▶ metrics backends, each in a thread of its own
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apprentice.errors import StorageError
from apprentice.run.folder import Run
from apprentice.run.json_lines import cut_torn_tail, read_records
from apprentice.run.time_ledger import TimeLedger
from apprentice.train.metrics.tensorboard import EventFile
from apprentice.train.metrics.time_keeper import TimeKeeper
from apprentice.train.metrics.writer import BackendWriter

STATUS_EVERY_S = 2.0  # between two writes of status.json
TIME_EVERY_S = 10.0  # between two writes of the ledger of time while no step is made
_log = logging.getLogger(__name__)
SCALARS = {
    "loss": "train/loss",
    "smoothed_loss": "train/smoothed_loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "ledger_drift": "train/mixture_drift",
    "tokens_per_s": "speed/tokens_per_s",
    "tokens_per_s_worker": "speed/tokens_per_s_worker",
    "mfu": "speed/mfu",
    "eta_s": "speed/eta_s",
    "data_wait": "speed/data_wait",
    "goodput": "speed/goodput",
    "validation_loss": "validation/loss",
    "held_out": "validation/held_out_score",
    "saved_s": "checkpoint/seconds",
    "blocked_s": "checkpoint/seconds_blocked",
    **{name: f"preference/{name}" for name in ("accuracy", "margin", "chosen_reward", "rejected_reward")},
    **{name: f"replies/{name}" for name in ("reward", "kl", "clipped", "reply_tokens")},
}


class MovingAverage:
    """Exponential moving average with factor 0.9 and bias correction. Values that are not finite are left out."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def update(self, value: float) -> float:
        """Takes the next value; returns the average with it."""
        if math.isfinite(value):
            self._sum, self._weight = 0.9 * self._sum + value, 0.9 * self._weight + 1.0
        return self._sum / self._weight if self._weight else value


class Tracker:
    """Writes the records in the driver, and sums tokens and seconds of all steps but the first of each attempt (warm-up).

    `progress` gets every record that is news to a person; `backends` get the figures of `SCALARS`; `may_write` says whether this
    process still holds the run and may write into its folder; `time_keeper` follows the time of the call.
    """

    def __init__(
        self,
        run: Run,
        progress: Callable[[dict[str, Any]], None],
        backends: Sequence[BackendWriter] = (),
        may_write: Callable[[], bool] = lambda: True,
        time_keeper: TimeKeeper | None = None,
    ) -> None:
        self._run = run
        self._progress: Callable[[dict[str, Any]], None] | None = progress
        self._backends = backends
        self._may_write = may_write
        self._smoothed = MovingAverage()
        self._file = run.folder / "steps.jsonl"
        self._scratch = None if run.folder.is_local else tempfile.TemporaryDirectory()
        earlier = read_records(self._file)
        self._lines = [json.dumps(record) for record in earlier] if self._scratch is not None else []  # not yet written
        self._earlier_attempts = earlier[-1]["attempt"] if earlier else 0
        if self._scratch is None and (torn_bytes := cut_torn_tail(self._file)):
            self.show({"message": f"{self._file} ended in {torn_bytes} bytes of a line that was never finished; they are cut off"})
        folder = run.events.local if self._scratch is None else Path(self._scratch.name)
        self._events: EventFile | None = EventFile(folder)
        self._events_folder = folder
        self._has_told_of_error = False  # whether the user knows of a write error
        self._status_at = 0.0
        self.time = time_keeper or TimeKeeper(TimeLedger.from_status(run.status()))
        self._warm_attempts: set[int] = set()
        self.tokens = 0
        self.seconds = 0.0
        self.waited = 0.0
        self.memory: dict[str, int] | None = None  # the record of peak memory: peak (bytes), micro, trained, workers

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record: a step (with `loss`), a validation (with `validation_loss`) or a message; and shows it.

        `attempt` is counted on from earlier calls of `train()` on this run. A full disk is reported once and stops nothing: lines
        of steps.jsonl wait for room; status and TensorBoard events of that time are lost.
        """
        if self.time.take(record):
            self.write_time()
            return
        record = record | {"attempt": record["attempt"] + self._earlier_attempts}
        if "loss" in record:
            record["smoothed_loss"] = self._smoothed.update(record["loss"])
            record["tokens_per_s_worker"] = record["tokens_per_s"] / record["workers"]
            record["goodput"] = round(self.time.ledger.goodput, 4)
        self._lines.append(json.dumps(record))
        if "loss" in record:
            self._count(record)
        self.memory = record.get("memory", self.memory)
        for write in (self._write_lines, lambda: self._write_events(record), lambda: self._update_status(record)):
            if not self._may_write():
                break
            try:
                write()
            except (OSError, StorageError) as error:
                self._show_error_once(error)
        self._send_to_backends({name: record[key] for key, name in SCALARS.items() if record.get(key) is not None}, record["step"])
        if "saved_s" not in record and "memory" not in record:  # no news for a person
            self.show({key: value for key, value in record.items() if key != "examples"})

    def show(self, values: dict[str, Any]) -> None:
        """Calls `progress`. If it raises, that is logged and it is not called again; training goes on."""
        if self._progress is None:
            return
        try:
            self._progress(values)
        except Exception:
            self._progress = None
            _log.exception("nothing more is shown of the run, which goes on")

    def _write_lines(self) -> None:
        """Appends all waiting lines to steps.jsonl, or none if one cannot be written."""
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

    def _write_events(self, record: dict[str, Any]) -> None:
        if self._events is None:
            return
        try:
            for key, name in SCALARS.items():
                if record.get(key) is not None:
                    self._events.add_scalar(name, record[key], record["step"])
            for sample in record.get("samples", ()):
                self._events.add_text(f"samples/{sample['instruction']}", sample["reply"], record["step"])
        except OSError:
            self._events.give_up()
            self._events = None  # half an event may be in the file, and nothing after it would be read
            raise

    def _send_to_backends(self, values: Mapping[str, float], step: int) -> None:
        """Gives `values` to all backends, and shows their messages."""
        for backend in self._backends:
            if values:
                backend.add(values, step)
            self._show_messages(backend)

    def _show_messages(self, backend: BackendWriter) -> None:
        for message in backend.take_messages():
            self.show({"message": message})

    def _show_error_once(self, error: OSError | StorageError) -> None:
        if not self._has_told_of_error:
            self._has_told_of_error = True
            reason = getattr(error, "strerror", None) or error
            self.show({"message": f"{self._run.folder} cannot be written to ({reason}); make room there. Training goes on."})

    def _count(self, record: dict[str, Any]) -> None:
        if record["attempt"] in self._warm_attempts:
            self.tokens += record["tokens"]
            self.seconds += record["seconds"]
            self.waited += record["data_wait_s"]
        self._warm_attempts.add(record["attempt"])

    def _update_status(self, record: dict[str, Any]) -> None:
        keys = ("step", "steps", "loss") if "loss" in record else ("validation_loss", "held_out")
        figures = {key: record[key] for key in keys if record.get(key) is not None}
        if "loss" in record:
            if time.monotonic() - self._status_at < STATUS_EVERY_S and record["step"] < record["steps"]:
                return
            self._status_at = time.monotonic()
        elif figures:
            if record["step"] < self._run.status().get("validated_step", 0):
                return  # a late result of an older checkpoint
            figures["validated_step"] = record["step"]
        else:
            return
        self._run.update_status(state="training", **figures, time=asdict(self.time.ledger))

    def keep_time(self) -> None:
        """Enters the time until now where no step is made, every `TIME_EVERY_S` seconds."""
        if time.monotonic() - self._status_at >= TIME_EVERY_S:
            self.time.pass_time()
            self.write_time()

    def write_time(self, end: str | None = None) -> None:
        """Writes the ledger of time into status.json; with `end`, "person" or "fault", as one of a call that ended so."""
        if end is not None:
            self.time.end(end)
        self._status_at = time.monotonic()
        if self._may_write():
            try:
                self._run.update_status(time=asdict(self.time.ledger))
            except (OSError, StorageError) as error:
                self._show_error_once(error)

    def close(self) -> None:
        """Closes backends and files; writes what is left if this process still holds the run.

        Raises `OSError` where there is no room for the last lines.
        """
        for backend in self._backends:
            backend.close()
            self._show_messages(backend)
        if self._events is not None:
            events, self._events = self._events, None
            events.close()
        if self._may_write():
            self._write_lines()
            if self._scratch is not None:
                self._file.write_text("".join(line + "\n" for line in self._lines))
                self._run.events.upload(self._events_folder)
        if self._scratch is not None:
            self._scratch.cleanup()
