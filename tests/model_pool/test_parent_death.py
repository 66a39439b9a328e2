"""What a replica starts ends with it, and with nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib

import psutil

from tests.conftest import ROOT

# A process whose children are started by a thread that ends, one of them by a fork without another program.
PARENT = """
import multiprocessing, subprocess, sys, threading, time
from apprentice.model_pool.parent_death import guard_children
guard_children()
def start():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()
thread = threading.Thread(target=start)
thread.start()
thread.join()
print("started", flush=True)
time.sleep(600)
"""


def watched(watcher: psutil.Process) -> int:
    """Processes that the watcher has in its hands."""
    links = [os.readlink(f"/proc/{watcher.pid}/fd/{name}") for name in os.listdir(f"/proc/{watcher.pid}/fd")]
    return sum("pidfd" in link for link in links)


def test_children_outlive_their_thread_and_end_with_their_process() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        deadline = time.monotonic() + 30
        below = psutil.Process(parent.pid).children()
        (watcher,) = [child for child in below if "apprentice.model_pool.parent_death" in child.cmdline()]
        others = [child for child in below if child != watcher]
        assert len(others) == 2
        while watched(watcher) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert all(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in others)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.communicate()
    _, alive = psutil.wait_procs([*others, watcher], timeout=30)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []


def test_nothing_is_installed_into_vllm() -> None:
    """An entry point of vLLM's plugins would change every program with vLLM in the environment."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert "entry-points" not in project
