"""Process priority and OpenMP thread waiting of a replica on a machine that other processes share."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

log = logging.getLogger(__name__)
NICENESS = "RAY_worker_niceness"  # Ray's variable for the niceness of its workers, Serve's controller and proxies among them
SPINS = "GOMP_SPINCOUNT"  # libgomp's variable: loop turns for which a waiting thread spins before it sleeps
_FEW_SPINS = 1000  # some microseconds; libgomp's default on a machine that it thinks it has alone is 300,000, which is milliseconds
_SAMPLES, _SAMPLE_S = 10, 0.05
_LOAD = Path("/proc/loadavg")


def raise_priority() -> None:
    """Sets all threads of this process to niceness 0, because Ray starts its workers at 15.

    At 15, a token takes seconds beside any other work on the machine. Does nothing where `RAY_worker_niceness` is set. Logs a
    warning where the process has no right to change its niceness.
    """
    if NICENESS in os.environ or os.getpriority(os.PRIO_PROCESS, 0) <= 0:
        return
    try:
        for thread in os.listdir("/proc/self/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), 0)
    except ProcessLookupError:
        pass  # a thread that has just ended
    except PermissionError:
        niceness = os.getpriority(os.PRIO_PROCESS, 0)
        log.warning("this replica runs at niceness %d, behind all other work; start Ray's nodes with %s=0", niceness, NICENESS)


def limit_thread_spinning(threads: int) -> None:
    """Makes OpenMP's waiting threads sleep early where `threads` of ours and the machine's other busy threads exceed the CPUs.

    A waiting thread that spins there takes the CPU from the very thread that it waits for. Call this before PyTorch is imported:
    libgomp reads `GOMP_SPINCOUNT` when it is loaded. Does nothing after that, or if it or `OMP_WAIT_POLICY` is already set.
    """
    if "torch" in sys.modules or {SPINS, "OMP_WAIT_POLICY"} & os.environ.keys():
        return
    if threads + count_busy_threads() > (os.cpu_count() or 1):
        os.environ[SPINS] = str(_FEW_SPINS)


def count_busy_threads() -> int:
    """Number of threads on this machine, besides the calling one, that want a CPU all the time.

    The minimum of ten samples of /proc/loadavg in about half a second, so that a burst does not count; 0 without such a file.
    """
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
