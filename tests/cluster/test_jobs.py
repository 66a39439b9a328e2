"""The pipeline as a Ray job: a real cluster started with `ray start --head`, `apprentice submit` and `ray job submit`."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import yaml

from tests.conftest import ROOT
from tests.data.small import write_tasks
from tests.support.recipes import tiny_recipe
from tests.support.sockets import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
# A cluster of its own, guarded by a token as Ray does by itself where the user has one.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
ENVIRONMENT |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard's address of a cluster of its own, stopped at the end."""
    dashboard, ports = (
        free_port(),
        {name: free_port() for name in ("port", "ray-client-server-port", "dashboard-agent-listen-port")},
    )
    log = tmp_path_factory.mktemp("head") / "ray.log"
    command = [RAY, "start", "--head", "--block", "--num-cpus=6", "--node-ip-address=127.0.0.1"]
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
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:  # Ray waits for its own processes, which a busy machine ends late
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)


def _answers(url: str) -> bool:
    """True once the dashboard is up; it refuses us (401), since only Ray's own client knows the cluster's token."""
    try:
        return httpx.get(url, timeout=5).status_code < 500
    except httpx.HTTPError:
        return False


def ray_submit(head: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", "submit", "--address", head, "--working-dir", str(ROOT), "--", "python", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=ENVIRONMENT)


def submit(recipe: Path, head: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`apprentice submit RECIPE --follow --json` in the recipe's folder."""
    program = "import sys; from apprentice.cli import main; sys.argv[0] = 'apprentice'; main()"
    command = [sys.executable, "-c", program, "submit", recipe.name, *words, "--address", head, "--follow", "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=recipe.parent, env=ENVIRONMENT | environment)


SECRET = "hf_" + secrets.token_hex(12)


def test_the_road_is_submitted_followed_and_deployed_and_given_again_does_nothing_twice(head, tiny_model, tmp_path):
    write_tasks(tmp_path)
    tasks = ["quickstart", "./sums.yaml"]
    recipe = tiny_recipe(tmp_path, tiny_model, data__tasks=tasks, training__steps=3, serving__port=free_port())
    done = submit(recipe, head, HF_TOKEN=SECRET)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    run = tmp_path / "runs" / "tiny"
    assert (result["run"], result["attached"]) == (str(run), False)
    assert result["job"].endswith("-1")
    assert json.loads((run / "status.json").read_text())["state"] == "trained"
    assert len(json.loads((run / "report" / "report.json").read_text())["tasks"]) >= 8
    assert "train     step 3/3" in done.stderr

    modified = {path: path.stat().st_mtime_ns for name in ("model", "report") for path in (run / name).iterdir()}
    (tmp_path / "notes.md").write_text("So that Ray unpacks the folder, with the task's file in it, elsewhere.")
    again = submit(recipe, head, "--deploy", HF_TOKEN=SECRET)
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads(again.stdout)["job"] == result["job"][:-1] + "2"
    assert "trained already" in again.stderr
    assert "evaluated already" in again.stderr
    assert modified == {path: path.stat().st_mtime_ns for path in modified}
    reply = httpx.post(
        f"http://127.0.0.1:{yaml.safe_load(recipe.read_text())['serving']['port']}/v1/instruct",
        json={"instruction": "Name a colour.", "input": "", "max_tokens": 4}, timeout=120,
    )  # fmt: skip
    assert reply.status_code == 200, reply.text

    everything = done.stdout + done.stderr + again.stdout + again.stderr + said_by_ray(head)
    everything += "".join(path.read_text(errors="replace") for path in run.rglob("*.json*"))
    assert SECRET not in everything
    assert ENVIRONMENT["RAY_AUTH_TOKEN"] not in everything


def said_by_ray(head: str) -> str:
    """What Ray's dashboard tells about all jobs: entry points, runtime environments, metadata."""
    answer = httpx.get(f"{head}/api/jobs/", headers={"Authorization": f"Bearer {ENVIRONMENT['RAY_AUTH_TOKEN']}"}, timeout=60)
    assert answer.status_code == 200
    assert '"submission_id"' in answer.text
    return answer.text


def test_a_job_with_a_wrong_recipe_fails_with_one_sentence(head, tiny_model, tmp_path):
    recipe = tiny_recipe(tmp_path, tiny_model, data__tasks=["muliti_nli"], data__hold_out=[])
    done = submit(recipe, head)
    assert done.returncode == 1
    assert "failed: data.tasks: 'muliti_nli' is not a task. Did you mean 'multi_nli'?" in json.loads(done.stdout)["error"]
    assert not (tmp_path / "runs").exists()


def test_rays_own_command_runs_the_scripts(head, tiny_model, tmp_path):
    recipe = tiny_recipe(tmp_path, tiny_model)
    done = ray_submit(head, "jobs/prepare_data.py", "--recipe", str(recipe))
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(tmp_path / "runs" / "tiny") in done.stdout
    assert (tmp_path / "runs" / "tiny" / "index").is_dir()


def test_without_the_token_nothing_is_sent(head, tiny_model, tmp_path):
    done = submit(tiny_recipe(tmp_path, tiny_model), head, RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode == 1, done.stderr
    assert "asks for a token, and has another than lies here" in json.loads(done.stdout)["error"]


def test_nobody_answers(tiny_model, tmp_path):
    done = submit(tiny_recipe(tmp_path, tiny_model), f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 1, done.stderr
    assert "no Ray dashboard answers at http://127.0.0.1" in json.loads(done.stdout)["error"]


FOLLOWED = """
import json, sys
from apprentice.jobs import submit as jobs
from apprentice.errors import RunError

name, address = sys.argv[1:]
first, second = (jobs.submit(name, [], address=address) for _ in range(2))
jobs.stop(first.job, address=address)
try:
    jobs.follow(first, address=address, say=lambda line: None)
except RunError as error:
    ending = str(error)
third = jobs.submit(name, [], address=address)
jobs.stop(third.job, address=address)
print(json.dumps({"jobs": [one.job for one in (first, second, third)], "attached": [one.attached for one in (first, second, third)],
                  "ending": ending}))
"""


def test_a_live_job_is_followed_and_a_dead_one_gets_the_next_attempt(head, tiny_model, tmp_path):
    recipe = tiny_recipe(tmp_path, tiny_model, name="long", training__steps=2000)
    # A process of its own: Ray reads the token once in a process, and this one may have asked for it before.
    command = [sys.executable, "-c", FOLLOWED, recipe.name, head]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    first, second, third = outcome["jobs"]
    assert (first, third) == (second, first[:-1] + "2")
    assert outcome["attached"] == [False, True, False]
    assert "was stopped; give the same command again" in outcome["ending"]
    assert drivers_of(first) == drivers_of(third) == []  # the third was stopped before its driver had begun


def drivers_of(job: str) -> list[str]:
    """Processes that work on the job, besides Ray's own."""
    commands = []
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdigit() and job.encode() in (process / "environ").read_bytes():
                commands.append((process / "cmdline").read_text().replace("\0", " "))
    return [command for command in commands if "apprentice.jobs" in command]
