"""Processes that a replica started end with it, however it ends; else vLLM's would keep its memory when it is killed.

A process beside the replica watches it and kills what is left of its descendants. Nothing is installed into vLLM, and nothing hangs
on the thread that started them: a parent-death signal comes when that thread ends, however long the process goes on.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess  # nosec B404
import sys
from contextlib import suppress
from pathlib import Path

_LOOK_S = 0.2  # between two looks for new descendants


def guard_children() -> None:
    """Has what this process starts, now or later, killed when this process is gone."""
    command = [sys.executable, "-m", "apprentice.serve.engines.parent_death", str(os.getpid())]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def _watch(pid: int) -> None:
    """Waits for the end of process `pid`, then kills its descendants of the last moments. A pidfd never means another process."""
    found: dict[int, int] = {}
    watched = os.pidfd_open(pid)
    while not select.select([watched], [], [], _LOOK_S)[0]:
        alive = _descendants(pid) - {os.getpid()}
        for gone in found.keys() - alive:
            os.close(found.pop(gone))
        for new in alive - found.keys():
            with suppress(ProcessLookupError):
                found[new] = os.pidfd_open(new)
    for descriptor in found.values():
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)


def _descendants(pid: int) -> set[int]:
    """Processes that `pid` started, those that they started, and so on."""
    children: set[int] = set()
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has just ended
            children |= set(map(int, thread.read_text().split()))
    return children.union(*map(_descendants, children))


if __name__ == "__main__":
    with suppress(ProcessLookupError):
        _watch(int(sys.argv[1]))
