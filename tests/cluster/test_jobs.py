"""The road as a Ray job: a real cluster started with `ray start --head`, and `ray job submit`."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT
from tests.recipes import tiny_recipe

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
# A cluster of its own, guarded by a token as Ray does by itself where the user has one.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
ENVIRONMENT |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard's address of a cluster of its own, stopped at the end."""
    dashboard, ports = (
        free_port(),
        {name: free_port() for name in ("port", "ray-client-server-port", "dashboard-agent-listen-port")},
    )
    log = tmp_path_factory.mktemp("head") / "ray.log"
    command = [RAY, "start", "--head", "--block", "--num-cpus=4", "--node-ip-address=127.0.0.1"]
    ports["dashboard-port"] = dashboard
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *(f"--{name}={port}" for name, port in ports.items())],
            stdout=out, stderr=out, env=ENVIRONMENT, start_new_session=True,
        )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{dashboard}"
        deadline = time.monotonic() + 240
        while not _answers(f"{address}/api/version"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def _answers(url: str) -> bool:
    """True once the dashboard is up; it refuses us (401), since only Ray's own client knows the cluster's token."""
    try:
        return httpx.get(url, timeout=5).status_code < 500
    except httpx.HTTPError:
        return False


def submit(head: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", "submit", "--address", head, "--working-dir", str(ROOT), "--", "python", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=ENVIRONMENT)


def test_the_pipeline_runs_as_a_job(head, tiny_model, tmp_path):
    recipe = tiny_recipe(tmp_path, tiny_model)
    done = submit(head, "jobs/pipeline.py", "--recipe", str(recipe), "training.steps=3")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "tiny"
    assert str(run) in done.stdout
    assert json.loads((run / "status.json").read_text())["state"] == "trained"
    report = json.loads((run / "report" / "report.json").read_text())
    assert len(report["tasks"]) >= 8
    assert (run / "model" / "model.safetensors").is_file()


def test_a_job_with_a_wrong_recipe_fails_with_one_sentence(head, tiny_model, tmp_path):
    recipe = tiny_recipe(tmp_path, tiny_model, data__tasks=["muliti_nli"], data__hold_out=[])
    done = submit(head, "jobs/train.py", "--recipe", str(recipe))
    assert done.returncode != 0
    assert "error: data.tasks: 'muliti_nli' is not a task. Did you mean 'multi_nli'?" in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()
