"""Kills the processes that a worker or a replica started once it is gone, however it ended.

Otherwise vLLM's processes would keep their memory when it is killed. A watcher process beside it follows its
descendants and kills those that outlive it; nothing is patched in vLLM. A parent-death signal (`PR_SET_PDEATHSIG`) does not serve
here: it is sent when the thread that started the process ends, even if its process goes on.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess  # nosec B404
import sys
from contextlib import suppress
from pathlib import Path

_LOOK_S = 0.2  # seconds between two looks for new descendants


def guard_children() -> None:
    """Starts a watcher that kills all descendants of this process, present and future, once this process is gone."""
    command = [sys.executable, "-m", "apprentice.model_pool.parent_death", str(os.getpid())]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def _watch(pid: int) -> None:
    """Waits for the end of process `pid`, then kills the descendants that it had at the last look.

    Descendants are kept as pidfds, because a pid may be reused by another process.
    """
    pidfds: dict[int, int] = {}
    watched = os.pidfd_open(pid)
    while not select.select([watched], [], [], _LOOK_S)[0]:
        alive = _descendants(pid) - {os.getpid()}
        for gone in pidfds.keys() - alive:
            os.close(pidfds.pop(gone))
        for new in alive - pidfds.keys():
            with suppress(ProcessLookupError):
                pidfds[new] = os.pidfd_open(new)
    for descriptor in pidfds.values():
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)


def _descendants(pid: int) -> set[int]:
    """Ids of all processes below `pid`: its children, their children, and so on."""
    children: set[int] = set()
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has just ended
            children |= set(map(int, thread.read_text().split()))
    return children.union(*map(_descendants, children))


if __name__ == "__main__":
    with suppress(ProcessLookupError):
        _watch(int(sys.argv[1]))
