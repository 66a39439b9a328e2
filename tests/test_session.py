"""A local Ray session, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os
from apprentice.session import ray_session
import ray
init = ray.init
def told(**settings):
    os.write(2, b"of ours: " + b"kept\\n")
    return init(**settings)
ray.init = told
with ray_session(niceness=0):
    print(ray.is_initialized(), ray.cluster_resources()["CPU"] > 2)
    niceness = ray.remote(lambda: os.getpriority(os.PRIO_PROCESS, 0)).remote()
    print(ray.get(niceness) == os.getpriority(os.PRIO_PROCESS, 0))
print(ray.is_initialized())
"""


@pytest.mark.slow
def test_a_local_session_starts_and_ends_without_a_word_but_what_somebody_else_says() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout.split(), done.stderr) == (["True", "True", "True", "False"], "of ours: kept\n")
