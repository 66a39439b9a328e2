"""vLLM's processes end with the replica that started them, however it ends; else they would keep its memory when it is killed.

vLLM calls `hold` in each of its processes, because `pyproject.toml` names it as a plugin of vLLM.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal

PR_SET_PDEATHSIG = 1  # prctl(2): the signal that this process gets when its parent ends


def hold() -> None:
    """Has the kernel end this process when the one that started it ends; does nothing in one that vLLM did not start."""
    if multiprocessing.parent_process() is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
