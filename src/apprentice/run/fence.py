"""The fence of a run: who may write to it, and which of its checkpoints count (docs/guides/run_folder.md).

    <run>/fence/000001.json, 000002.json, …   entries, each created only where none lies; the last one is what holds
    <run>/fence/beat-000001                   the counter that the holder of attempt 1 renews

To take a run, to begin a group of workers and to commit a checkpoint are one thing: to create the entry after the last one. Whoever
was overtaken finds that entry taken, reads it, and knows. A holder is dead when its counter has stood still for `STILL_S` of the
taker's own clock, or at once if its process ran on this machine and is no more. Knows nothing of what is in a checkpoint.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from apprentice.errors import MissingError, RunError, StorageError
from apprentice.storage import Folder, answer_of

BEAT_S = 5.0  # between two renewals of the counter
STILL_S = 60.0  # without one, after which a holder is dead
LOOK_S = 1.0  # between two looks at somebody else's counter
JOB_VARIABLE = "RAY_JOB_SUBMISSION_ID"  # Ray's, in what a job runs

FENCE = "fence"  # folder in a run's

Tell = Callable[[str], None]


class FencedError(RunError):
    """Somebody else holds the run."""


@dataclass(frozen=True)
class Holder:
    """The process that took a run. `machine` and `started` tell it from another one of the same number."""

    command: str
    host: str
    pid: int
    machine: str
    started: str
    job: str | None
    since: str

    @classmethod
    def here(cls, command: str) -> Holder:
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        pid = os.getpid()
        return cls(command, socket.gethostname(), pid, _machine(), _started(pid) or "", os.environ.get(JOB_VARIABLE), now)

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"`{self.command}` (process {self.pid} on {self.host}{job}) since {self.since}"

    @property
    def is_gone(self) -> bool:
        """Whether the process ran on this machine and is no more; False where that cannot be known."""
        if not self.machine or not self.started or self.machine != _machine():
            return False
        started = _started(self.pid)
        return started is None or started not in ("", self.started)

    @property
    def way_to_stop(self) -> str:
        return f"`ray job stop {self.job}`" if self.job else f"`kill {self.pid}` on {self.host}"


def _machine() -> str:
    """This boot of this machine, and within it this container; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When the process began, in the kernel's own count; None if there is none, or only its remains; empty if nobody tells."""
    try:
        with suppress(PermissionError):  # it is somebody else's
            os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except ProcessLookupError:
        return None
    except OSError:
        return ""
    return None if status[0] in "ZX" else status[19]


@dataclass(frozen=True)
class Entry:
    """One entry: the state of the fence after it. `attempt` is the number of the entry with which the holder took the run."""

    number: int
    attempt: int
    group: int  # of workers, counted within the attempt; 0 before the first
    writer: int  # number of the entry with which that group began; 0 before the first
    holder: Holder
    released: bool
    checkpoints: tuple[str, ...]  # those that count, oldest first
    id: str  # tells an entry of one's own from another's, where the store's answer was lost

    def to_json(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Entry:
        known = {name: value[name] for name in cls.__dataclass_fields__}
        return cls(**known | {"holder": Holder(**value["holder"]), "checkpoints": tuple(value["checkpoints"])})


@dataclass(frozen=True)
class Log:
    """The entries of one run."""

    run: Folder

    @property
    def folder(self) -> Folder:
        return self.run / FENCE

    def look(self) -> tuple[Entry | None, int]:
        """The newest entry, None if there is none, and the number after it.

        Raises `StorageError` for a store that does not answer.
        """
        files = [file for file in answer_of(self.folder, self.folder.children) if _is_entry(file)]
        numbers = sorted((int(file.name.removesuffix(".json")) for file in files), reverse=True)
        for number in numbers:
            file = self._file(number)
            try:
                return Entry.from_json(json.loads(answer_of(file, file.read_bytes))), numbers[0] + 1
            except (MissingError, ValueError):  # deleted with the run; or, on a disk without links, cut off in its first moment
                continue
        return None, max(numbers, default=0) + 1

    def last(self) -> Entry | None:
        return self.look()[0]

    def _file(self, number: int) -> Folder:
        return self.folder / f"{number:06d}.json"

    def add(self, entry: Entry) -> bool:
        """Creates `entry`; False if another one lies at its number."""
        file = self._file(entry.number)
        data = json.dumps(entry.to_json(), indent=2).encode()
        if answer_of(file, lambda: file.create(data)):
            return True
        last = self.last()
        return last is not None and last.id == entry.id  # made, and the answer was lost

    def beat(self, attempt: int) -> bytes:
        """The counter of an attempt's holder; empty before its first renewal."""
        file = self.folder / f"beat-{attempt:06d}"
        try:
            return answer_of(file, file.read_bytes)
        except MissingError:
            return b""


def _is_entry(file: Folder) -> bool:
    return file.name.endswith(".json") and file.name.removesuffix(".json").isdigit()


@dataclass(frozen=True)
class Token:
    """The right of one attempt to write to a run, and of a group of its workers to commit checkpoints; for any process."""

    run: Folder
    attempt: int
    group: int = 0
    writer: int = 0

    def check(self) -> tuple[Entry, int]:
        """The newest entry and the number after it. Raises `FencedError` if it is another attempt's, or a later group's."""
        last, number = Log(self.run).look()
        if last is None:
            raise FencedError(f"run {self.run.name!r} has been deleted while it was written to; nothing more is written.")
        if last.attempt != self.attempt or last.released:
            raise FencedError(
                f"run {self.run.name!r} has been taken over by {last.holder}; this attempt writes nothing more: follow that one."
            )
        if self.writer and last.writer != self.writer:
            raise FencedError(f"other workers go on with run {self.run.name!r}; what these wrote last does not count.")
        return last, number

    def begin_group(self, group: int) -> Token:
        """The right of the workers' group of this number in the attempt; takes it from all groups before."""
        while True:
            last, number = self.check()
            if last.group > group:
                raise FencedError(f"other workers go on with run {self.run.name!r}; these do not begin.")
            if Log(self.run).add(_after(last, number, group=group, writer=number)):
                return replace(self, group=group, writer=number)

    def commit(self, checkpoint: str, kept: Callable[[str], bool]) -> None:
        """Makes the checkpoint of this name count, beside those before it that are `kept`. Raises `FencedError` if overtaken."""
        while True:
            last, number = self.check()
            names = (*filter(kept, last.checkpoints), checkpoint)
            if Log(self.run).add(_after(last, number, checkpoints=names)):
                return


def _after(last: Entry, number: int, **changes: Any) -> Entry:
    return replace(last, number=number, id=uuid.uuid4().hex, **changes)


def committed(run: Folder) -> set[str] | None:
    """The names of the checkpoints that count; None for a run without a fence, where every whole one does."""
    last = Log(run).last()
    return None if last is None else set(last.checkpoints)


class Hold:
    """A run that this process holds. A thread renews the counter, and stops when somebody else has taken the run."""

    def __init__(self, entry: Entry, run: Folder, clock: Callable[[], float]) -> None:
        self.token = Token(run, entry.number)
        self._clock = clock
        self._seen = clock()  # when it was last known that nobody else has the run
        self._lost = False
        self._count = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew_again, name="apprentice-fence", daemon=True)

    def start(self) -> None:
        self.renew()
        self._thread.start()

    def _renew_again(self) -> None:
        while not self._over.wait(BEAT_S) and not self._lost:
            with suppress(OSError, StorageError):  # the next one may come through; who took over meanwhile is found out then
                self.renew()

    def renew(self) -> None:
        """Counts on, unless the run was taken over."""
        try:
            self.token.check()
        except FencedError:
            self._lost = True
            return
        self._seen = self._clock()
        self._count += 1
        self._beat.write_bytes(f"{self._count}\n".encode())

    @property
    def _beat(self) -> Folder:
        return self.token.run / FENCE / f"beat-{self.token.attempt:06d}"

    def is_held(self) -> bool:
        """Whether this process may still write; asks the store only if nothing was heard of it for a while."""
        if not self._lost and self._clock() - self._seen > STILL_S / 2:
            with suppress(OSError, StorageError):
                self.renew()
        return not self._lost and self._clock() - self._seen <= STILL_S / 2

    def release(self) -> None:
        """Ends the hold, so that the next one need not wait; a run folder in which nothing else lies goes."""
        self._over.set()
        self._thread.join()
        log = Log(self.token.run)
        with suppress(OSError, StorageError, FencedError):  # or else the next one waits until the counter has stood still
            last, number = self.token.check()
            self._beat.delete()
            if [child.name for child in answer_of(log.run, log.run.children)] == [log.folder.name]:
                log.run.delete()
            else:
                log.add(_after(last, number, released=True))


_HELD: dict[str, tuple[Hold, int]] = {}  # of this process, and how many `hold` each


@contextmanager
def hold(
    run: Folder,
    command: str,
    *,
    tell: Tell = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[Hold]:
    """Holds `run` for as long as the block takes; a process may hold what it holds already.

    Raises `FencedError` if somebody else holds it, after waiting for `STILL_S` where that one gives no sign of life.
    """
    held, depth = _HELD.get(run.uri, (None, 0))
    if held is None:
        held = Hold(_take(Log(run), Holder.here(command), tell, clock, wait), run, clock)
        held.start()
    _HELD[run.uri] = (held, depth + 1)
    try:
        yield held
    finally:
        if depth:
            _HELD[run.uri] = (held, depth)
        else:
            del _HELD[run.uri]
            held.release()


def _take(log: Log, holder: Holder, tell: Tell, clock: Callable[[], float], wait: Callable[[float], None]) -> Entry:
    while True:
        last = refuse_held(log.run, tell=tell, clock=clock, wait=wait)
        now, number = log.look()
        if (now and now.id) != (last and last.id):
            continue  # somebody came between
        if now is None:
            # A run of an earlier version: what it saved counts. Numbers begin after those in its folders' names.
            names = [folder.name for folder in answer_of(log.run, (log.run / "checkpoints").children)]
            older = tuple(name for name in names if name.startswith("step-"))
            number = max([number, *(1 + int(name.partition(".")[2] or 1) for name in older)])
        entry = Entry(number, number, 0, 0, holder, False, older if now is None else now.checkpoints, uuid.uuid4().hex)
        if log.add(entry):
            return entry


def refuse_held(
    run: Folder,
    *,
    tell: Tell = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> Entry | None:
    """The last entry of a run that nobody holds. Raises `FencedError` if somebody does.

    Who gives no sign of life is waited for until the counter has stood still for `STILL_S`.
    """
    log = Log(run)
    last = log.last()
    if last is None or last.released or last.holder.is_gone or run.uri in _HELD:
        return last
    seen, since, told = log.beat(last.attempt), clock(), False
    while clock() - since < STILL_S:
        wait(LOOK_S)
        try:
            now = log.last()
            beat = log.beat(last.attempt)
        except StorageError:
            since = clock()  # who cannot look has seen nothing stand still
            continue
        if now is None or now.released:
            return now
        if now.number != last.number or beat != seen:
            raise FencedError(
                f"run {run.name!r} is held by {now.holder}; two at once would spoil it. Wait for its end, or stop it with"
                f" {now.holder.way_to_stop} and give the same command again: it is taken over when no sign of life has come for"
                f" {STILL_S:g} seconds."
            )
        if not told and clock() - since > 2 * BEAT_S:
            tell(f"{last.holder} holds the run and gives no sign of life; it is taken over in {STILL_S - 2 * BEAT_S:g} seconds")
            told = True
    return last
