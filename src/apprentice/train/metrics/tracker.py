"""Tracker and mailbox: bring the records of a running training to the driver, which writes them.

    worker of rank 0 ──▶ Mailbox (a Ray actor) ──▶ Tracker in the driver ──▶ steps.jsonl, TensorBoard events, status.json, progress

The mailbox also holds the state that driver and workers share: the checkpoint from which the current attempt started, whether a
checkpoint is requested, the first error that the user can mend, and which workers are silent. An attempt is one worker group, from
start to end or failure.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from apprentice.errors import ApprenticeError, StorageError
from apprentice.run.folder import Run
from apprentice.run.json_lines import cut_torn_tail, read_records
from apprentice.train.metrics.tensorboard import Events
from apprentice.train.metrics.writer import BackendWriter

if TYPE_CHECKING:  # imports torch, which takes two seconds and the mailbox does not need
    from apprentice.train.checkpoint.format import Checkpoint
    from apprentice.train.distributed.heartbeat import WorkerProcess

STATUS_EVERY_S = 2.0  # between two writes of status.json
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
    "validation_loss": "validation/loss",
    "held_out": "validation/held_out_score",
    "saved_s": "checkpoint/seconds",
    "blocked_s": "checkpoint/seconds_blocked",
    **{name: f"preference/{name}" for name in ("accuracy", "margin", "chosen_reward", "rejected_reward")},
    **{name: f"replies/{name}" for name in ("reward", "kl", "clipped", "reply_tokens")},
}


class RunOutcome(NamedTuple):
    """Number of worker groups started, the error that ended the run, and a sentence for each worker that was silent."""

    attempts: int
    error: ApprenticeError | None
    silent: list[str]


class Mailbox:
    """State shared by driver and workers; a Ray actor, one for each `train()` call, that outlives the worker groups."""

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers
        self._wishes = 0
        self._wanted = False
        self._seen: dict[int, tuple[WorkerProcess, float]] = {}  # this attempt's workers by rank: when each was last heard
        self._hung: list[WorkerProcess] = []  # this attempt's silent workers
        self._silent: list[str] = []
        self._at = (0, 0)  # step of the newest record, and expected steps
        self._stream_cpus = 0.0
        self._attempt = 0
        self._from: Checkpoint | None = None
        self._error: ApprenticeError | None = None
        self._records: list[dict[str, Any]] = []
        self._forgotten = 0  # records that the driver has received

    def resize(self, workers: int) -> None:
        """Sets the number of workers of the next worker group."""
        if workers != self._workers:
            self.note(f"training goes on with {workers} worker{'s' if workers != 1 else ''} instead of {self._workers}")
        self._workers = workers

    def begin(self, checkpoint: Checkpoint | None) -> int:
        """Begins an attempt: a worker group is about to start from `checkpoint`. Returns its number of workers."""
        self._attempt += 1
        self._from = checkpoint
        self._wishes = 0
        self.part()
        return self._workers

    def stream(self, cpus: float) -> None:
        """Sets the number of CPUs that the data actors of this attempt hold."""
        self._stream_cpus = cpus

    def stream_cpus(self) -> float:
        return self._stream_cpus

    def part(self) -> None:
        """Forgets the workers of an attempt that has ended."""
        self._seen = {}
        self._hung = []
        self._wanted = False

    def start(self) -> tuple[int, Checkpoint | None, bool]:
        """First call of a worker: the attempt's number (from 1), the checkpoint to restore, and whether the run has failed."""
        return self._attempt, self._from, self._error is not None

    def fail(self, error: ApprenticeError) -> None:
        """Records an error that no further attempt would mend; the first one counts."""
        self._error = self._error or error

    def put(self, record: dict[str, Any]) -> None:
        self._at = (record["step"], record["steps"])
        if "saved_s" in record:  # a checkpoint has been written
            self._wanted = False
        self._records.append(record)

    def validated(self, step: int, figures: Mapping[str, Any]) -> None:
        """Adds a record with the validation figures of the checkpoint of `step`, computed outside the workers."""
        self._records.append({"attempt": max(self._attempt, 1), "step": step, "steps": self._at[1] or step, **figures})

    def note(self, message: str) -> None:
        """Adds a message for the user, at the current step."""
        step, steps = self._at
        self._records.append({"attempt": self._attempt, "step": step, "steps": steps, "message": message})

    def want(self) -> None:
        """Asks the workers for a checkpoint."""
        self._wishes += 1
        self._wanted = True

    def wanted(self) -> bool:
        """Whether a checkpoint was requested and none has been written since."""
        return self._wanted

    def beat(self, attempt: int, who: WorkerProcess) -> int:
        """Takes a worker's heartbeat. Returns how many checkpoints were requested in this attempt."""
        if attempt == self._attempt and who not in self._hung:  # a worker that is being ended no longer counts
            self._seen[who.rank] = (who, time.monotonic())
        return self._wishes

    def leave(self, rank: int) -> None:
        """Takes note that a worker ends normally."""
        self._seen.pop(rank, None)

    def silent(self, limit_s: float) -> list[WorkerProcess]:
        """Workers of this attempt without a heartbeat for `limit_s` seconds.

        Each is noted once, but returned by all later calls of the attempt, since an answer may be lost on the network.
        """
        now = time.monotonic()
        for who in [who for who, at in self._seen.values() if now - at > limit_s]:
            del self._seen[who.rank]
            self._hung.append(who)
            self._silent.append(f"{who} had not answered for {limit_s:g} seconds and was ended")
            self.note(self._silent[-1])
        return self._hung

    def take(self, seen: int = 0) -> list[dict[str, Any]]:
        """All records after the first `seen`, which are dropped. A call with the same `seen`, after a lost answer, repeats them."""
        del self._records[: seen - self._forgotten]
        self._forgotten = seen
        return self._records

    def outcome(self) -> RunOutcome:
        return RunOutcome(self._attempt, self._error, self._silent)


class MovingAverage:
    """Exponential moving average with factor 0.9 and bias correction. Values that are not finite are left out."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def after(self, value: float) -> float:
        if math.isfinite(value):
            self._sum, self._weight = 0.9 * self._sum + value, 0.9 * self._weight + 1.0
        return self._sum / self._weight if self._weight else value


class Tracker:
    """Writes the records in the driver, and sums tokens and seconds of all steps but the first of each attempt (warm-up).

    `progress` gets every record that is news to a person; `services` get the figures of `SCALARS`; `may_write` says whether this
    process still holds the run and may write into its folder.
    """

    def __init__(
        self,
        run: Run,
        progress: Callable[[dict[str, Any]], None],
        services: Sequence[BackendWriter] = (),
        may_write: Callable[[], bool] = lambda: True,
    ) -> None:
        self._run = run
        self._progress: Callable[[dict[str, Any]], None] | None = progress
        self._services = services
        self._may_write = may_write
        self._smoothed = MovingAverage()
        self._file = run.folder / "steps.jsonl"
        self._scratch = None if run.folder.is_local else tempfile.TemporaryDirectory()
        earlier = read_records(self._file)
        self._lines = [json.dumps(record) for record in earlier] if self._scratch is not None else []  # not yet written
        self._earlier_attempts = earlier[-1]["attempt"] if earlier else 0
        if self._scratch is None and (torn := cut_torn_tail(self._file)):
            self._show({"message": f"{self._file} ended in {torn} bytes of a line that was never finished; they are cut off"})
        folder = run.events.local if self._scratch is None else Path(self._scratch.name)
        self._events: Events | None = Events(folder)
        self._events_folder = folder
        self._told = False  # whether the user knows of a write error
        self._status_at = 0.0
        self._warm: set[int] = set()
        self.tokens = 0
        self.seconds = 0.0
        self.waited = 0.0
        self.memory: dict[str, int] | None = None  # the record of peak memory: peak (bytes), micro, trained, workers

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record: a step (with `loss`), a validation (with `validation_loss`) or a message; and shows it.

        `attempt` is counted on from earlier calls of `train()` on this run. A full disk is reported once and stops nothing: lines
        of steps.jsonl wait for room; status and TensorBoard events of that time are lost.
        """
        record = record | {"attempt": record["attempt"] + self._earlier_attempts}
        if "loss" in record:
            record["smoothed_loss"] = self._smoothed.after(record["loss"])
            record["tokens_per_s_worker"] = record["tokens_per_s"] / record["workers"]
        self._lines.append(json.dumps(record))
        if "loss" in record:
            self._count(record)
        self.memory = record.get("memory", self.memory)
        for put in (self._write_lines, lambda: self._draw(record), lambda: self._update_status(record)):
            if not self._may_write():
                break
            try:
                put()
            except (OSError, StorageError) as error:
                self._tell_once(error)
        self._pass_on({name: record[key] for key, name in SCALARS.items() if record.get(key) is not None}, record["step"])
        if "saved_s" not in record and "memory" not in record:  # no news for a person
            self._show({key: value for key, value in record.items() if key != "examples"})

    def _show(self, values: dict[str, Any]) -> None:
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

    def _draw(self, record: dict[str, Any]) -> None:
        if self._events is None:
            return
        try:
            for key, name in SCALARS.items():
                if record.get(key) is not None:
                    self._events.add(name, record[key], record["step"])
            for sample in record.get("samples", ()):
                self._events.add_text(f"samples/{sample['instruction']}", sample["reply"], record["step"])
        except OSError:
            self._events.give_up()
            self._events = None  # half an event may be in the file, and nothing after it would be read
            raise

    def _pass_on(self, values: Mapping[str, float], step: int) -> None:
        """Gives `values` to all services, and shows their messages."""
        for service in self._services:
            if values:
                service.add(values, step)
            self._tell_of(service)

    def _tell_of(self, service: BackendWriter) -> None:
        for message in service.told():
            self._show({"message": message})

    def _tell_once(self, error: OSError | StorageError) -> None:
        if not self._told:
            self._told = True
            reason = getattr(error, "strerror", None) or error
            self._show({"message": f"{self._run.folder} cannot be written to ({reason}); make room there. Training goes on."})

    def _count(self, record: dict[str, Any]) -> None:
        if record["attempt"] in self._warm:
            self.tokens += record["tokens"]
            self.seconds += record["seconds"]
            self.waited += record["data_wait_s"]
        self._warm.add(record["attempt"])

    def _update_status(self, record: dict[str, Any]) -> None:
        keys = ("step", "steps", "loss") if "loss" in record else ("validation_loss", "held_out")
        known = {key: record[key] for key in keys if record.get(key) is not None}
        if "loss" in record:
            if time.monotonic() - self._status_at < STATUS_EVERY_S and record["step"] < record["steps"]:
                return
            self._status_at = time.monotonic()
        elif known:
            if record["step"] < self._run.status().get("validated_step", 0):
                return  # a late result of an older checkpoint
            known["validated_step"] = record["step"]
        else:
            return
        self._run.update_status(state="training", **known)

    def close(self) -> None:
        """Closes services and files; writes what is left if this process still holds the run.

        Raises `OSError` where there is no room for the last lines.
        """
        for service in self._services:
            service.close()
            self._tell_of(service)
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
