"""How a replica behaves on a machine that it does not have to itself: its priority, and how its threads wait for each other.

Knows nothing of engines, Ray or HTTP.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

log = logging.getLogger(__name__)
NICENESS = "RAY_worker_niceness"  # Ray's variable for the niceness of its workers, Serve's controller and proxies among them
SPINS = "GOMP_SPINCOUNT"  # libgomp's variable: turns of a thread that waits for another before it sleeps
_FEW_SPINS = 1000  # some microseconds; where libgomp thinks it has the machine to itself it is 300,000, which is milliseconds
_SAMPLES, _SAMPLE_S = 10, 0.05
_LOAD = Path("/proc/loadavg")


def take_priority() -> None:
    """All threads of this process run at niceness 0 from now on, if nobody said otherwise: Ray starts its workers at 15.

    Beside any other work on the machine that makes a token take seconds. Without the right to do so it is told.
    """
    if NICENESS in os.environ or os.getpriority(os.PRIO_PROCESS, 0) <= 0:
        return
    try:
        for thread in os.listdir("/proc/self/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), 0)
    except ProcessLookupError:
        pass  # a thread that has just ended
    except PermissionError:
        found = os.getpriority(os.PRIO_PROCESS, 0)
        log.warning("this replica runs at niceness %d, behind all other work; start Ray's nodes with %s=0", found, NICENESS)


def spin_little_if_crowded(threads: int) -> None:
    """Where others keep the CPUs busy that `threads` of ours want, ours sleep while they wait for each other.

    A thread that spins then takes the CPU from the very one that it waits for. libgomp reads its variable when PyTorch is loaded,
    so this comes before that; what a person has set stays.
    """
    if "torch" in sys.modules or {SPINS, "OMP_WAIT_POLICY"} & os.environ.keys():
        return
    if threads + others_running() > (os.cpu_count() or 1):
        os.environ[SPINS] = str(_FEW_SPINS)


def others_running() -> int:
    """Threads besides this one that want a CPU all the time: the fewest of half a second, so that a burst does not count."""
    fewest: list[int] = []
    for sample in range(_SAMPLES):
        if sample:
            time.sleep(_SAMPLE_S)
        try:
            running = _LOAD.read_text().split()[3].partition("/")[0]
        except OSError:
            return 0
        fewest.append(max(0, int(running) - 1))
    return min(fewest)
