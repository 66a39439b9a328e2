"""The fence of a run: a log in the run folder that allows one writer at a time and lists the committed checkpoints.

    <run>/fence/000001.json, 000002.json, …   log entries, each created only if it does not exist; the last one is valid
    <run>/fence/beat-000001                   heartbeat counter, renewed by the holder that took the run with entry 1

Taking a run, starting a group of workers and committing a checkpoint are the same operation: creating the next entry. Creation is
exclusive, so that a process that was overtaken finds its entry taken, reads it, and stops:

    000001   A takes the run                        attempt 1
    000002   A's workers start                      attempt 1, group 1, writer 2
    000003   A's workers commit a checkpoint        attempt 1, group 1, writer 2
    000004   B takes the run: A's heartbeat stood   attempt 4
             still for 60 seconds
    A's next commit reads 000004, whose attempt is not 1, and raises `FencedError`

A holder is dead when its counter has not changed for `EXPIRY_S` seconds of the taker's own clock, so that clocks of machines are
never compared, or at once if its process ran on this machine and has ended. See docs/guides/run_folder.md.
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
from apprentice.storage import Folder, with_retries

HEARTBEAT_S = 5.0  # seconds between two heartbeats
EXPIRY_S = 60.0  # seconds without a heartbeat after which a holder is dead
POLL_S = 1.0  # seconds between two reads of another holder's heartbeat
JOB_VARIABLE = "RAY_JOB_SUBMISSION_ID"  # set by Ray in the processes of a job

FENCE = "fence"  # name of the folder in the run folder

Tell = Callable[[str], None]


class FencedError(RunError):
    """Another process holds the run, or another group of workers writes to it."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a run. `machine` and `started` distinguish it from another process with the same `pid`."""

    command: str
    host: str
    pid: int
    machine: str
    started: str
    job: str | None
    since: str

    @classmethod
    def here(cls, command: str) -> Holder:
        """This process as the holder of a run, which `command` names to others."""
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        pid = os.getpid()
        return cls(command, socket.gethostname(), pid, _machine(), _started(pid) or "", os.environ.get(JOB_VARIABLE), now)

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"`{self.command}` (process {self.pid} on {self.host}{job}) since {self.since}"

    @property
    def is_gone(self) -> bool:
        """Whether the process ran on this machine and has ended; False where that cannot be known."""
        if not self.machine or not self.started or self.machine != _machine():
            return False
        started = _started(self.pid)
        return started is None or started not in ("", self.started)

    @property
    def stop_command(self) -> str:
        """The command that stops the holder, for messages."""
        return f"`ray job stop {self.job}`" if self.job else f"`kill {self.pid}` on {self.host}"


def _machine() -> str:
    """An id of this boot of this machine and of its PID namespace (container); empty where the system has none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None if it has ended or is a zombie; empty where it cannot be read."""
    try:
        with suppress(PermissionError):  # it exists and belongs to another user
            os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except ProcessLookupError:
        return None
    except OSError:
        return ""
    return None if status[0] in "ZX" else status[19]


@dataclass(frozen=True)
class FenceEntry:
    """One log entry, which holds the whole state of the fence. `attempt` is the number of the entry that took the run."""

    number: int
    attempt: int
    group: int  # number of the group of workers within the attempt; 0 before the first
    writer: int  # number of the entry with which that group started; 0 before the first
    holder: Holder
    released: bool  # True once the holder gave the run up
    checkpoints: tuple[str, ...]  # names of the committed checkpoints, oldest first
    id: str  # random; identifies one's own entry where the store's answer to its creation was lost

    def to_json(self) -> dict[str, Any]:
        """The entry as the content of its file."""
        return {"format": 1, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FenceEntry:
        """The entry in a file's content; keys of later versions are ignored."""
        known = {name: value[name] for name in cls.__dataclass_fields__}
        return cls(**known | {"holder": Holder(**value["holder"]), "checkpoints": tuple(value["checkpoints"])})


@dataclass(frozen=True)
class FenceLog:
    """The log of one run's fence; reads and adds entries. All methods raise `StorageError` for a store that does not answer."""

    run: Folder

    @property
    def folder(self) -> Folder:
        """The folder of the log's entries and heartbeats."""
        return self.run / FENCE

    def look(self) -> tuple[FenceEntry | None, int]:
        """(newest readable entry or None, number of the next entry)."""
        files = [file for file in with_retries(self.folder, self.folder.children) if _is_entry(file)]
        numbers = sorted((int(file.name.removesuffix(".json")) for file in files), reverse=True)
        for number in numbers:
            file = self._file(number)
            try:
                return FenceEntry.from_json(json.loads(with_retries(file, file.read_bytes))), numbers[0] + 1
            except (MissingError, ValueError):  # deleted with the run; or, on a disk without hard links, not yet written whole
                continue
        return None, max(numbers, default=0) + 1

    def last(self) -> FenceEntry | None:
        """The newest readable entry; None without one."""
        return self.look()[0]

    def _file(self, number: int) -> Folder:
        return self.folder / f"{number:06d}.json"

    def add(self, entry: FenceEntry) -> bool:
        """Creates `entry`; False if another entry has its number."""
        file = self._file(entry.number)
        data = json.dumps(entry.to_json(), indent=2).encode()
        if with_retries(file, lambda: file.create(data)):
            return True
        last = self.last()
        return last is not None and last.id == entry.id  # created, but the store's answer was lost

    def beat(self, attempt: int) -> bytes:
        """The heartbeat counter of an attempt's holder as bytes; empty before its first heartbeat."""
        file = self.folder / f"beat-{attempt:06d}"
        try:
            return with_retries(file, file.read_bytes)
        except MissingError:
            return b""


def _is_entry(file: Folder) -> bool:
    return file.name.endswith(".json") and file.name.removesuffix(".json").isdigit()


@dataclass(frozen=True)
class FenceToken:
    """A fencing token: the right of one attempt, and of one group of its workers, to write to a run.

    Picklable; the driver passes it to its workers. A token with `writer` 0 is not bound to a group.
    """

    run: Folder
    attempt: int
    group: int = 0
    writer: int = 0

    def check(self) -> tuple[FenceEntry, int]:
        """(newest entry, number of the next). Raises `FencedError` if the run was released, taken over, deleted or regrouped."""
        last, number = FenceLog(self.run).look()
        if last is None:
            raise FencedError(f"run {self.run.name!r} has been deleted while it was written to; nothing more is written.")
        if last.attempt != self.attempt or last.released:
            raise FencedError(
                f"run {self.run.name!r} has been taken over by {last.holder}; this attempt writes nothing more: follow that one."
            )
        if self.writer and last.writer != self.writer:
            raise FencedError(f"other workers go on with run {self.run.name!r}; what these wrote last does not count.")
        return last, number

    def start_group(self, group: int) -> FenceToken:
        """Adds the entry that starts worker group number `group`, and returns its token; tokens of earlier groups become invalid.

        Raises `FencedError` if overtaken.
        """
        while True:
            last, number = self.check()
            if last.group > group:
                raise FencedError(f"other workers go on with run {self.run.name!r}; these do not begin.")
            if FenceLog(self.run).add(_after(last, number, group=group, writer=number)):
                return replace(self, group=group, writer=number)

    def commit(self, checkpoint: str, kept: Callable[[str], bool]) -> None:
        """Adds an entry that lists `checkpoint` behind those earlier ones for which `kept` is true.

        `kept` is called again for each attempt, since another thread may have committed something before it.
        Raises `FencedError` if overtaken.
        """
        while True:
            last, number = self.check()
            names = (*filter(kept, last.checkpoints), checkpoint)
            if FenceLog(self.run).add(_after(last, number, checkpoints=names)):
                return


def _after(last: FenceEntry, number: int, **changes: Any) -> FenceEntry:
    return replace(last, number=number, id=uuid.uuid4().hex, **changes)


def committed_checkpoints(run: Folder) -> set[str] | None:
    """Names of the committed checkpoints; None for a run without a fence, in which every complete checkpoint counts."""
    last = FenceLog(run).last()
    return None if last is None else set(last.checkpoints)


class Lease:
    """This process's lease on a run. A thread renews the heartbeat until it is released or another process takes the run."""

    def __init__(self, entry: FenceEntry, run: Folder, clock: Callable[[], float]) -> None:
        self.token = FenceToken(run, entry.number)
        self._clock = clock
        self._seen = clock()  # time of the last successful check that the run is still held
        self._lost = False
        self._count = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew_again, name="apprentice-fence", daemon=True)

    def start(self) -> None:
        """Writes the first heartbeat, and starts the thread that writes the others."""
        self.renew()
        self._thread.start()

    def _renew_again(self) -> None:
        while not self._over.wait(HEARTBEAT_S) and not self._lost:
            with suppress(OSError, StorageError):  # the next attempt may succeed, and notices a takeover
                self.renew()

    def renew(self) -> None:
        """Writes the next heartbeat, unless the run was taken over."""
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
        """Whether this process may still write; reads the store only if the last check is older than `EXPIRY_S / 2`."""
        if not self._lost and self._clock() - self._seen > EXPIRY_S / 2:
            with suppress(OSError, StorageError):
                self.renew()
        return not self._lost and self._clock() - self._seen <= EXPIRY_S / 2

    def release(self) -> None:
        """Releases the run, so that the next holder need not wait; deletes a run folder that holds only the fence."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        log = FenceLog(self.token.run)
        with suppress(OSError, StorageError, FencedError):  # after a failure the next holder waits for `EXPIRY_S`
            last, number = self.token.check()
            self._beat.delete()
            if [child.name for child in with_retries(log.run, log.run.children)] == [log.folder.name]:
                log.run.delete()
            else:
                log.add(_after(last, number, released=True))


_LEASES: dict[str, tuple[Lease, int]] = {}  # run URI → (lease of this process, nesting depth of `lease_run`)


@contextmanager
def lease_run(
    run: Folder,
    command: str,
    *,
    tell: Tell = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[Lease]:
    """Context manager that holds `run` for the block; reentrant within a process.

    `tell` gets a message while it waits for a holder without heartbeats; `clock` (seconds) and `wait` are replaced in tests.
    Raises `FencedError` if another process holds the run. A holder whose heartbeat stands still for `EXPIRY_S` is taken over.
    """
    lease, depth = _LEASES.get(run.uri, (None, 0))
    if lease is None:
        lease = Lease(_take(FenceLog(run), Holder.here(command), tell, clock, wait), run, clock)
    _LEASES[run.uri] = (lease, depth + 1)
    try:
        if not depth:
            lease.start()
        yield lease
    finally:
        if depth:
            _LEASES[run.uri] = (lease, depth)
        else:
            del _LEASES[run.uri]
            lease.release()


def _take(log: FenceLog, holder: Holder, tell: Tell, clock: Callable[[], float], wait: Callable[[float], None]) -> FenceEntry:
    while True:
        last = wait_until_free(log.run, tell=tell, clock=clock, wait=wait)
        now, number = log.look()
        if (now and now.id) != (last and last.id):
            continue  # another process added an entry meanwhile
        if now is None:
            # No fence: the run is new or of an earlier version, whose checkpoints all count. Numbers begin after those they name.
            names = [folder.name for folder in with_retries(log.run, (log.run / "checkpoints").children)]
            older = tuple(name for name in names if name.startswith("step-"))
            number = max([number, *(1 + int(name.partition(".")[2] or 1) for name in older)])
        entry = FenceEntry(number, number, 0, 0, holder, False, older if now is None else now.checkpoints, uuid.uuid4().hex)
        if log.add(entry):
            return entry


def wait_until_free(
    run: Folder,
    *,
    tell: Tell = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> FenceEntry | None:
    """The last entry of a run that nobody else holds; None without entries. Raises `FencedError` if another process holds it.

    Waits up to `EXPIRY_S` seconds for a heartbeat of the holder; without one the run counts as free.
    """
    log = FenceLog(run)
    last = log.last()
    if last is None or last.released or last.holder.is_gone or run.uri in _LEASES:
        return last
    first_beat, since, announced = log.beat(last.attempt), clock(), False
    while clock() - since < EXPIRY_S:
        wait(POLL_S)
        try:
            now = log.last()
            beat = log.beat(last.attempt)
        except StorageError:
            since = clock()  # without an answer of the store nothing is known about the heartbeat
            continue
        if now is None or now.released:
            return now
        if now.number != last.number or beat != first_beat:
            raise FencedError(
                f"run {run.name!r} is held by {now.holder}; two at once would spoil it. Wait for its end, or stop it with"
                f" {now.holder.stop_command} and give the same command again: it is taken over when no sign of life has come for"
                f" {EXPIRY_S:g} seconds."
            )
        if not announced and clock() - since > 2 * HEARTBEAT_S:
            tell(
                f"{last.holder} holds the run and gives no sign of life; it is taken over in {EXPIRY_S - 2 * HEARTBEAT_S:g} seconds"
            )
            announced = True
    return last
