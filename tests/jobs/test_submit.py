"""Before anything is sent to a cluster: what is refused, what the job is called, and what it is told. No Ray is started."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from ray.exceptions import AuthenticationError

from apprentice.console import Screen
from apprentice.errors import RecipeError, ResourcesError, RunError, ServingError
from apprentice.jobs import deploy, submit
from apprentice.jobs import stages as jobs
from apprentice.recipe import load_recipe
from apprentice.serve.api.limits.api_keys import KEYS_FILE, new_key
from apprentice.serve.deployment import AppArguments
from apprentice.tasks.registry import library
from tests.conftest import ROOT
from tests.support.recipes import tiny_recipe
from tests.support.tls import make_certificates, tls_before

ADDRESS = "http://127.0.0.1:1"


class Dashboard:
    """Stands in for Ray's client: keeps what it is sent."""

    def __init__(self, statuses: dict[str, str] | None = None) -> None:
        self.statuses = statuses or {}
        self.sent: list[dict[str, Any]] = []

    def list_jobs(self) -> list[Any]:
        return [type("Job", (), {"submission_id": name})() for name in self.statuses]

    def get_job_status(self, job: str) -> str:
        return self.statuses[job]

    def submit_job(self, **arguments: Any) -> None:
        self.sent.append(arguments)


@pytest.fixture
def dashboard(monkeypatch) -> Dashboard:
    one = Dashboard()
    monkeypatch.setattr(submit, "connect", lambda address, ca=None: one)
    return one


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "storage": ({"storage": "./runs"}, "storage './runs' is a path of this machine"),
    "root": ({"data__root": "../data"}, "data.root '../data' is a path of this machine"),
    "model": ({"model__base": "./model"}, "model.base './model' is a path of this machine"),
    "adapters": ({"serving__adapters": "adapters"}, "serving.adapters 'adapters' is a path of this machine"),
    "beside": ({"serving__beside": ["org/model", "../other"]}, r"serving.beside '\.\./other' is a path of this machine"),
    "judge": ({"evaluation__judge": "~/judge"}, "evaluation.judge '~/judge' is a path of this machine"),
    "home": ({"storage": "~/runs"}, "storage '~/runs' is a path of this machine"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_paths_of_this_machine_are_refused_before_anything_is_sent(dashboard, tmp_path, name):
    changes, words = REFUSED[name]
    recipe = tiny_recipe(tmp_path, Path("/models/tiny"), **changes)
    with pytest.raises(RecipeError, match=words):
        submit.submit(str(recipe), [], address=ADDRESS, folder=tmp_path)
    assert dashboard.sent == []


def test_a_shipped_recipe_needs_only_its_places(dashboard):
    with pytest.raises(RecipeError, match=r"storage '\./runs' is a path"):
        submit.submit("flan_mini", [], address=ADDRESS)
    sent = submit.submit("flan_mini", ["storage=s3://bucket/runs", "data.root=/shared/data"], address=ADDRESS)
    assert sent.run == "s3://bucket/runs/flan-mini"
    words = dashboard.sent[0]["entrypoint"]
    assert words == ("exec python -m apprentice.jobs pipeline --recipe flan_mini storage=s3://bucket/runs data.root=/shared/data")


def test_a_recipe_or_task_that_would_stay_behind_is_refused(dashboard, tmp_path):
    inside = tmp_path / "project"
    inside.mkdir()
    recipe = tiny_recipe(tmp_path, Path("/models/tiny"))
    with pytest.raises(RecipeError, match="only that folder is sent"):
        submit.submit(str(recipe), [], address=ADDRESS, folder=inside)
    own = tiny_recipe(inside, Path("/models/tiny"), data__tasks=["quickstart", "../mine.yaml"])
    with pytest.raises(RecipeError, match=r"mine\.yaml is not under"):
        submit.submit(str(own), [], address=ADDRESS, folder=inside)
    others = tiny_recipe(inside, Path("/models/tiny"), data__tasks=["quickstart", {"natural_instructions": "../tasks/*.json"}])
    with pytest.raises(RecipeError, match=r"tasks/\*\.json is not under"):
        submit.submit(str(others), [], address=ADDRESS, folder=inside)
    assert dashboard.sent == []
    clusters = tiny_recipe(
        inside, Path("/models/tiny"), data__tasks=["quickstart", {"natural_instructions": "/shared/tasks/*.json"}]
    )
    submit.submit(str(clusters), [], address=ADDRESS, folder=inside)
    assert len(dashboard.sent) == 1


def test_rows_that_are_not_packed_are_refused(dashboard, tmp_path):
    parquet = tiny_recipe(tmp_path, Path("/models/tiny"), data__tasks=["quickstart", {"alpaca": "rows.parquet"}])
    with pytest.raises(RecipeError, match=r"rows\.parquet is not sent to the cluster"):
        submit.submit(str(parquet), [], address=ADDRESS, folder=tmp_path)
    own = yaml.safe_load(library()["ag_news"].read_text()) | {"name": "mine", "sources": [{"files": {"train": "mine.parquet"}}]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    task = tiny_recipe(tmp_path, Path("/models/tiny"), data__tasks=["quickstart", "./mine.yaml"])
    with pytest.raises(RecipeError, match=r"mine\.parquet is not sent to the cluster"):
        submit.submit(str(task), [], address=ADDRESS, folder=tmp_path)
    assert dashboard.sent == []
    own["sources"] = [{"files": {"train": "mine.csv", "test": "/shared/mine.parquet"}}]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(own))
    task = tiny_recipe(tmp_path, Path("/models/tiny"), data__tasks=["quickstart", "./other.yaml"])
    submit.submit(str(task), [], address=ADDRESS, folder=tmp_path)
    assert len(dashboard.sent) == 1


def test_what_is_sent(dashboard, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws_secret")
    recipe = tiny_recipe(tmp_path, Path("/models/tiny"))
    sent = submit.submit(str(recipe), ["training.steps=9"], address=ADDRESS, deploy=True, install=True, folder=tmp_path)
    (job,) = dashboard.sent
    assert job["submission_id"] == sent.job
    assert job["entrypoint"] == "exec python -m apprentice.jobs pipeline --recipe recipe.yaml --deploy training.steps=9"
    assert job["runtime_env"]["working_dir"] == str(tmp_path)
    assert job["runtime_env"]["pip"] == ["apprentice==0.1.0"]
    assert {"runs/", ".git/", "**/.env*", "**/*.safetensors"} <= set(job["runtime_env"]["excludes"])
    assert job["entrypoint_num_cpus"] == 1
    assert "secret" not in str(job)


@pytest.mark.parametrize(
    ("statuses", "number", "attached"),
    [
        ([], 1, False),
        (["RUNNING"], 1, True),
        (["PENDING"], 1, True),
        (["FAILED"], 2, False),
        (["FAILED", "STOPPED"], 3, False),
        (["FAILED", "RUNNING"], 2, True),
        (["SUCCEEDED"], 2, False),
    ],
)
def test_a_live_job_is_followed_and_a_dead_one_gets_the_next_attempt(dashboard, tmp_path, statuses, number, attached):
    recipe = tiny_recipe(tmp_path, Path("/models/tiny"))
    stem = submit.job_prefix(load_recipe(recipe))
    dashboard.statuses = {f"{stem}-{place + 1}": status for place, status in enumerate(statuses)} | {"another-7": "RUNNING"}
    sent = submit.submit(str(recipe), [], address=ADDRESS, folder=tmp_path)
    assert (sent.job, sent.attached) == (f"{stem}-{number}", attached)
    assert len(dashboard.sent) == (0 if attached else 1)


def test_the_id_is_the_runs(tmp_path):
    recipe = tiny_recipe(tmp_path, Path("/models/tiny"))
    stem = submit.job_prefix(load_recipe(recipe))
    assert stem.startswith("tiny-")
    assert submit.job_prefix(load_recipe(recipe, ["training.resources.cpus=2"])) == stem  # hardware is not the run's
    assert submit.job_prefix(load_recipe(recipe, ["seed=4"])) != stem
    assert submit.job_prefix(load_recipe(recipe, ["storage=/elsewhere"])) != stem


def test_another_version_on_the_cluster_is_refused(monkeypatch):
    monkeypatch.setenv("APPRENTICE_VERSION", "9.9")
    with pytest.raises(ResourcesError, match=r"has apprentice 0\.1\.0 and the job was sent by 9\.9"):
        jobs._same_version()


@pytest.mark.parametrize(("error", "code"), [(ZeroDivisionError("inside"), 3), (ResourcesError("too few"), 1)])
def test_a_job_ends_with_the_command_lines_exit_codes(monkeypatch, tmp_path, capsys, error, code):
    def broken(recipe: Any, screen: Screen) -> None:
        raise error

    monkeypatch.setitem(jobs.STAGES, "train", broken)
    with pytest.raises(SystemExit) as ended:
        jobs.run_job("train", ["--recipe", str(tiny_recipe(tmp_path, Path("/models/tiny")))])
    said = capsys.readouterr().err
    assert ended.value.code == code
    assert ("ZeroDivisionError: inside" in said) == (code == 3)
    assert re.search(r"^error: (too few|this is a fault of apprentice .*ZeroDivisionError.*report it)", said, re.MULTILINE)


def test_the_report_is_named_by_what_was_learned_and_how_it_was_scored(tmp_path):
    recipe = tiny_recipe(tmp_path, Path("/models/tiny"))
    name = jobs.evaluation_identity(load_recipe(recipe))
    assert jobs.evaluation_identity(load_recipe(recipe, ["serving.port=1", "training.workers=1"])) == name
    assert jobs.evaluation_identity(load_recipe(recipe, ["evaluation.max_examples=5"])) != name
    assert jobs.evaluation_identity(load_recipe(recipe, ["seed=4"])) != name


def test_what_is_deployed_is_the_projects_serve_file(tmp_path):
    config = deploy.serve_config("/runs/tiny/model", load_recipe(tiny_recipe(tmp_path, Path("/models/tiny"))))
    shipped = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    assert set(config) == set(shipped)
    assert set(config["applications"][0]) == set(shipped["applications"][0])
    assert AppArguments.model_validate(config["applications"][0]["args"]).max_running == 4


@pytest.mark.parametrize(
    ("keys", "deployed_keys"),
    [
        ({}, {}),
        ({"training__resources": {"cpus": 1, "gpus": 1}}, {"gpus": 1}),
        ({"serving__tensor_parallel": 4}, {"tensor_parallel": 4, "gpus": 4}),
        ({"serving__tensor_parallel": 2, "serving__engine": "vllm"}, {"tensor_parallel": 2}),  # over processes on CPUs
    ],
)
def test_what_was_trained_on_gpus_is_deployed_on_gpus(tmp_path, keys, deployed_keys):
    config = deploy.serve_config("/runs/tiny/model", load_recipe(tiny_recipe(tmp_path, Path("/models/tiny"), **keys)))
    arguments = config["applications"][0]["args"]
    assert {name: arguments[name] for name in ("tensor_parallel", "gpus") if name in arguments} == deployed_keys
    AppArguments.model_validate(arguments)


def test_a_run_beside_is_deployed_by_its_place(tmp_path):
    (tmp_path / "runs" / "other" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "other" / "identity.json").write_text("{}")
    recipe = load_recipe(tiny_recipe(tmp_path, Path("/models/tiny"), serving__beside=["other", "org/model", "/models/base"]))
    with pytest.raises(RunError, match=r"run 'other', which serving\.beside names, has no trained model yet"):
        jobs.run_pipeline(recipe, Screen(), deploy=True)
    assert not (tmp_path / "runs" / "tiny").exists()
    (tmp_path / "runs" / "other" / "model" / "apprentice.json").write_text("{}")
    arguments = deploy.serve_config("/runs/tiny/model", recipe)["applications"][0]["args"]
    assert arguments["beside"] == [str(tmp_path / "runs" / "other" / "model"), "org/model", "/models/base"]
    AppArguments.model_validate(arguments)


def test_nothing_is_deployed_for_everybody(tmp_path, monkeypatch):
    open_to_all = load_recipe(tiny_recipe(tmp_path, Path("/models/tiny"), serving__host="0.0.0.0"))
    monkeypatch.delenv(KEYS_FILE, raising=False)
    with pytest.raises(ServingError, match="no keys guard the endpoint"):
        deploy.serve_config("/runs/tiny/model", open_to_all)
    guard = tmp_path / "keys.yaml"
    guard.write_text(f"keys:\n{new_key('ada')[1]}")
    monkeypatch.setenv(KEYS_FILE, str(guard))
    config = deploy.serve_config("/runs/tiny/model", open_to_all)
    assert config["applications"][0]["args"]["keys_file"] == str(guard)


OURS = "apprentice.serve.app:app"


class Serve:
    """Stands in for Ray's client of Serve: what it is given replaces what was deployed that way, and comes up at once."""

    def __init__(self, applications: dict[str, Any], port: int = 8000) -> None:
        self.applications, self.port = applications, port
        self.sent: list[dict[str, Any]] = []
        self.rival: dict[str, Any] | None = None  # somebody who deploys right after us

    def get_serve_details(self) -> dict[str, Any]:
        return (
            {"applications": self.applications, "http_options": {"port": self.port}} if self.applications else {"applications": {}}
        )

    def deploy_applications(self, config: dict[str, Any]) -> None:
        self.sent.append(config)
        imperative = {name: one for name, one in self.applications.items() if not one["deployed_app_config"]}
        self.applications = imperative | {one["name"]: running(one) for one in config["applications"]}
        if self.rival is not None:
            self.applications, self.rival = self.rival, None


def running(config: dict[str, Any] | None, prefix: str = "/") -> dict[str, Any]:
    prefix = (config or {}).get("route_prefix", prefix)
    return {"status": "RUNNING", "route_prefix": prefix, "deployed_app_config": config, "message": ""}


def deployed(serve: Serve, name: str) -> deploy.Deployed:
    application = {"name": name, "route_prefix": "/", "import_path": OURS, "args": {"name": name}}
    config = {"http_options": {"port": 8000}, "logging_config": {"log_level": "WARNING"}, "applications": [application]}
    return deploy.deploy(serve, config, timeout_s=60.0)


def test_what_others_serve_stays_as_it_is():
    theirs = {"name": "theirs", "route_prefix": "/theirs", "import_path": "them:app", "deployments": [{"name": "a"}]}
    serve = Serve({"theirs": running(theirs), "by_hand": running(None, "/hand")}, port=9000)
    assert deployed(serve, "first") == ("first", 9000, "/")
    assert deployed(serve, "second") == ("second", 9000, "/second")
    assert deployed(serve, "second") == ("second", 9000, "/second")
    assert set(serve.applications) == {"theirs", "by_hand", "first", "second"}
    assert serve.applications["theirs"]["deployed_app_config"] == theirs
    for sent in serve.sent:
        assert "logging_config" not in sent  # Serve would give it to those that have none
    assert deployed(Serve({}), "alone") == ("alone", 8000, "/")


def test_an_application_of_an_earlier_version_is_replaced_by_its_own_recipe_alone():
    old = {"name": "apprentice", "route_prefix": "/", "import_path": OURS, "args": {"name": "first"}}
    serve = Serve({"apprentice": running(old)})
    assert deployed(serve, "second") == ("second", 8000, "/second")
    assert deployed(serve, "first") == ("first", 8000, "/")
    assert set(serve.applications) == {"first", "second"}


def test_who_deploys_at_the_same_time_takes_nothing_away():
    other = {"name": "other", "route_prefix": "/", "import_path": "them:app"}
    serve = Serve({})
    serve.rival = {"other": running(other)}
    assert deployed(serve, "ours") == ("ours", 8000, "/ours")
    assert set(serve.applications) == {"other", "ours"}


def test_what_does_not_come_up_is_said():
    serve = Serve({})
    serve.deploy_applications = lambda config: serve.applications.update(  # type: ignore[method-assign]
        ours={"status": "DEPLOY_FAILED", "message": "Traceback\nno room", "route_prefix": "/", "deployed_app_config": {}}
    )
    with pytest.raises(ServingError, match=r"^the endpoint does not come up: no room$"):
        deployed(serve, "ours")


class Tailed(Dashboard):
    """A job whose log grows while the connection to it breaks again and again."""

    log = "one\n" + "two" + "\n\nthree\n"

    def __init__(self, breaks_after: list[int]) -> None:
        super().__init__({"job": "RUNNING"})
        self.breaks = breaks_after

    async def tail_job_logs(self, job: str) -> Any:
        if not self.breaks:
            self.statuses["job"] = "SUCCEEDED"
            yield self.log
            return
        here = self.log[: self.breaks.pop(0)]
        for start in range(0, len(here), 3):
            yield here[start : start + 3]
        raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


def test_each_line_of_the_log_is_shown_once(monkeypatch):
    monkeypatch.setattr(submit, "connect", lambda address, ca=None: Tailed([0, 6, 5, 9, 13]))
    monkeypatch.setattr(submit, "POLL_S", 0.0)
    said: list[str] = []
    submit.follow(submit.Submission("job", "run", attached=True), address=ADDRESS, say=said.append)
    assert said == ["one", "two", "", "three"]


@pytest.mark.parametrize(
    "place", ["runs/x.jsonl", "a/runs/b/x.jsonl", "a/reports/x.csv", "a/.venv2/x.csv", "a/b/x.parquet", "x.csv"]
)
def test_what_is_not_packed_is_what_ray_leaves_out(place, tmp_path):
    from ray._private.runtime_env.packaging import _get_excludes  # Ray 2.60

    left_out = bool(_get_excludes(tmp_path, list(submit.NOT_PACKED))(tmp_path / place))
    assert submit._is_excluded(tmp_path / place, tmp_path) == left_out == (place != "x.csv")


class Refusing(Dashboard):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def list_jobs(self) -> list[Any]:
        raise self.error


@pytest.mark.parametrize(
    "error", [RuntimeError("Request failed with status code 401: Unauthorized"), AuthenticationError("Invalid token")]
)
def test_a_missing_or_wrong_token_is_said(monkeypatch, tmp_path, error):
    monkeypatch.setattr(submit, "connect", lambda address, ca=None: Refusing(error))
    with pytest.raises(
        ResourcesError, match=r"asks for a token, and has another than lies here; put its own into ~/\.ray/auth_token"
    ):
        submit.submit(str(tiny_recipe(tmp_path, Path("/models/tiny"))), [], address=ADDRESS, folder=tmp_path)


@pytest.mark.parametrize("text", ["no job tiny-4010403-1", "Request failed with status code 500: token bucket", "status 401"])
def test_an_error_that_only_sounds_like_it_is_none_of_authentication(monkeypatch, tmp_path, text):
    monkeypatch.setattr(submit, "connect", lambda address, ca=None: Refusing(RuntimeError(text)))
    with pytest.raises(RuntimeError, match=text):
        submit.submit(str(tiny_recipe(tmp_path, Path("/models/tiny"))), [], address=ADDRESS, folder=tmp_path)


class Asking(BaseHTTPRequestHandler):
    """A dashboard that keeps what was shown to it, and knows nobody."""

    shown: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.shown.append(self.headers.get("Authorization"))
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.mark.parametrize(("mode", "shown"), [(None, "Bearer " + "ab" * 32), ("disabled", None)])
def test_the_token_that_lies_here_is_shown(tmp_path, mode, shown):
    """`ray start` asks for it by itself where it lies, and Ray's own client of jobs would not show it."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("ab" * 32)
    Asking.shown.clear()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"HOME": str(tmp_path)} | ({"RAY_AUTH_MODE": mode} if mode else {})
    with HTTPServer(("127.0.0.1", 0), Asking) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = f"from apprentice.jobs import submit; submit.connect('http://127.0.0.1:{server.server_address[1]}')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
        server.shutdown()
    assert Asking.shown
    assert set(Asking.shown) == {shown}
    assert "asks for a token" in done.stderr


def test_a_certificate_of_a_stranger_is_said(tmp_path):
    _, server = make_certificates(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as nobody, tls_before(f"http://127.0.0.1:{nobody.getsockname()[1]}", server) as url:
        with pytest.raises(ResourcesError, match=r"signed by nobody whom this machine knows; name the CA's certificate: --ca FILE"):
            submit.connect(url)
        with pytest.raises(ResourcesError, match="no Ray dashboard answers"):
            submit.connect(url, str(tmp_path / "none.pem"))
