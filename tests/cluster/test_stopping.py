"""A job that is stopped ends, whenever the stop comes: Ray signals the shell and those of its children that it sees."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import pytest

from apprentice.jobs.submit import entrypoint

pytestmark = pytest.mark.timeout(400)
# What Ray's supervisor gives each driver; that it is there says that a process is one.
JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"metadata": {"job_submission_id": "tiny-1"}})}
DRIVER = """
import sys, time
from apprentice.jobs import stages as jobs
jobs.STAGES["train"] = lambda recipe, screen: (print("working", flush=True), time.sleep(300))
jobs.load_recipe, jobs.find_recipe, jobs.pipeline.check_order = lambda *_: None, lambda name: name, lambda _: None
if sys.argv[1:]:
    import os, pathlib
    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
    sys.stdin.read()
jobs.run_job("train", ["--recipe", "r"])
"""


@contextmanager
def shell(command: str) -> Iterator[tuple[int, TextIO, TextIO]]:
    """As Ray starts a job: through a shell that leads a session of its own. Gives its id, input and output."""
    environment, pipe = os.environ | JOB, subprocess.PIPE
    with subprocess.Popen(
        command, shell=True, start_new_session=True, stdin=pipe, stdout=pipe, text=True, env=environment
    ) as job:  # fmt: skip
        assert job.stdin is not None
        assert job.stdout is not None
        try:
            yield job.pid, job.stdin, job.stdout
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the driver goes on"
        time.sleep(0.02)


def test_a_submitted_jobs_shell_becomes_its_driver():
    words = [sys.executable, "-c", "import os, time; print(os.getpid(), *os.sys.argv[1:], flush=True); time.sleep(300)"]
    with shell(entrypoint([*words, "a b", "$HOME"])) as (job, _, output):
        assert output.readline() == f"{job} a b $HOME\n"
        os.kill(job, signal.SIGTERM)  # at whatever moment: there is no other process
        assert output.read() == ""


def test_a_stop_that_reaches_the_shell_alone_ends_the_driver(tmp_path):
    file = tmp_path / "driver.py"
    file.write_text(DRIVER)
    with shell(f"{sys.executable} {file}; true") as (job, _, output):  # `true`, so that no shell can leave itself out
        assert output.readline() == "working\n"
        (driver,) = map(int, Path(f"/proc/{job}/task/{job}/children").read_text().split())
        os.kill(job, signal.SIGKILL)
        wait_until_gone(driver)


def test_a_stop_before_the_driver_has_begun_ends_it_too(tmp_path):
    file, pid = tmp_path / "driver.py", tmp_path / "pid"
    file.write_text(DRIVER)
    with shell(f"{sys.executable} {file} {pid}; true") as (job, go, output):
        deadline = time.monotonic() + 300
        while not pid.exists() or not pid.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(job, signal.SIGKILL)
        os.waitpid(job, 0)
        go.close()  # only now the driver begins
        wait_until_gone(int(pid.read_text()))
        assert output.read() == ""
