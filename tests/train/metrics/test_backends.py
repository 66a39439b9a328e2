"""Where figures go: a real MLflow store, an offline run of Weights & Biases, Ray's metrics, and services that fail."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from apprentice.errors import RecipeError
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder
from apprentice.train.metrics import backends
from apprentice.train.metrics.tracker import Tracker
from apprentice.train.metrics.writer import BackendWriter
from tests.train.metrics.test_tracker import record


def recipe(*tracking: str) -> Recipe:
    training = {"steps": 4, "tracking": list(tracking), "optimizer": {"learning_rate": 3e-4}}
    return Recipe.model_validate({"name": "kite", "model": {"base": "tiny"}, "data": {"tasks": ["sst2"]}, "training": training})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Folder.at(tmp_path / "kite").make())


def test_mlflow_has_the_figures_and_one_run_however_often_it_is_taken_up(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for step in (1, 2):
        requests: list[dict[str, Any]] = []
        tracker = Tracker(run, requests.append, backends.open_backends(recipe("mlflow"), run)[1:])
        tracker.write(record(step, loss=float(step)))
        tracker.close()
        assert [one["message"] for one in requests if "message" in one] == []
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("apprentice")
    assert experiment is not None
    [mlflow_run] = client.search_runs([experiment.experiment_id])
    assert mlflow_run.info.run_name == "kite"
    assert mlflow_run.data.params["training.optimizer.learning_rate"] == "0.0003"
    history = client.get_metric_history(mlflow_run.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 1.0), (2, 2.0)]
    assert {
        "train/smoothed_loss",
        "train/grad_norm",
        "speed/tokens_per_s",
        "speed/tokens_per_s_worker",
    } <= mlflow_run.data.metrics.keys()


@pytest.mark.slow
def test_weights_and_biases_offline(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_API_KEY", "0" * 40)):
        monkeypatch.setenv(name, value)
    opened = backends.open_backends(recipe("wandb"), run)
    for step in range(1, 4):
        opened[1].add({"train/loss": float(step)}, step)
    opened[1].close()
    assert opened[1].take_messages() == []
    import wandb

    wandb.teardown()  # its own process writes the last of it
    [file] = tmp_path.rglob(f"run-{backends.key_of(run)}.wandb")
    assert b"train/loss" in file.read_bytes()


@pytest.mark.slow
def test_rays_metrics_have_the_figures(run: Run, ray_cluster: None) -> None:
    opened = backends.open_backends(recipe(), run)
    opened[0].add({"train/loss": 1.25, "speed/tokens_per_s": 50.0}, 7)
    [node] = [node for node in ray.nodes() if node["Alive"]]
    expected = {"train_loss": "1.25", "speed_tokens_per_s": "50.0", "train_step": "7.0"}
    deadline = time.monotonic() + 60
    while True:
        text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("ray_apprentice_") and 'run="kite"' in line]
        gauges = {line.partition("{")[0].removeprefix("ray_apprentice_"): line.rsplit(" ", 1)[1] for line in lines}
        if gauges == expected or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert gauges == expected


def test_a_package_that_is_not_installed_is_said_before_anything_starts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match=r"training\.tracking names wandb, which is not installed here; `pip install 'apprentice\["
    ):
        backends.open_backends(recipe("wandb"), run)


def messages_of(run: Run, *writers: BackendWriter) -> list[str]:
    """What a person sees of two steps' figures on their way to `writers`."""
    records: list[dict[str, Any]] = []
    tracker = Tracker(run, records.append, writers)
    for step in (1, 2):
        tracker.write(record(step))
    tracker.close()
    return [one["message"] for one in records if "message" in one]


def test_a_service_that_cannot_be_reached_is_told_of_and_training_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://at/all")
    [message] = messages_of(run, *backends.open_backends(recipe("mlflow"), run)[1:])
    assert message.startswith("mlflow does not take the run's figures (")
    assert message.endswith("; training goes on.")


class ScriptedBackend:
    """A service whose calls do what they are told to."""

    def __init__(self, add: Callable[[], Any] = lambda: None, close: Callable[[], Any] = lambda: None) -> None:
        self.took: list[int] = []
        self._add, self._close = add, close

    def add(self, values: Mapping[str, float], step: int) -> None:
        self._add()
        self.took.append(step)

    def close(self) -> None:
        self._close()


def failing(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def test_a_service_that_fails_later_is_told_of_once(run: Run) -> None:
    broken = ScriptedBackend(failing(ConnectionError("no\nroute")), failing(AssertionError("it was left before")))
    assert messages_of(run, BackendWriter("broken", lambda: broken)) == [
        "broken takes no more figures (no route); training goes on."
    ]


def test_figures_that_a_service_loses_at_the_end_are_told_of(run: Run) -> None:
    full = ScriptedBackend(close=failing(TimeoutError("it did not answer")))
    assert messages_of(run, BackendWriter("full", lambda: full)) == ["full may lack the last figures (it did not answer)."]
    assert full.took == [1, 2]


def test_nobody_waits_for_a_service_that_hangs() -> None:
    goes_on, taken = threading.Event(), threading.Event()

    def hang() -> None:
        taken.set()
        assert goes_on.wait(60)

    slow = ScriptedBackend(hang)
    writer = BackendWriter("slow", lambda: slow, most_queued=2)
    writer.add({"loss": 1.0}, 1)
    assert taken.wait(60)
    for step in range(2, 7):  # two of them wait, three are lost
        writer.add({"loss": 1.0}, step)
    assert writer.take_messages() == ["slow does not keep up: figures from step 4 on are lost to it; training goes on."]
    writer.close(timeout_s=0.1)
    assert writer.take_messages() == ["slow did not answer for 0.1 seconds at the end; it lacks the last figures."]
    goes_on.set()


def test_lost_figures_are_counted() -> None:
    goes_on = threading.Event()
    slow = ScriptedBackend()

    def make() -> ScriptedBackend:
        assert goes_on.wait(60)
        return slow

    writer = BackendWriter("slow", make, most_queued=2)
    for step in range(5):
        writer.add({"loss": 1.0}, step)
    goes_on.set()
    writer.close()
    assert writer.take_messages()[1:] == ["slow lacks 3 of the run's records, because it did not keep up."]
    assert slow.took == [0, 1]


def test_a_command_ends_though_a_backend_never_answers() -> None:
    program = """
import threading
from apprentice.train.metrics.writer import BackendWriter

class Hangs:
    def add(self, values, step):
        threading.Event().wait()

writer = BackendWriter("slow", Hangs)
writer.add({"loss": 1.0}, 1)
writer.close(timeout_s=0.1)
print(*writer.take_messages())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "slow did not answer for 0.1 seconds at the end; it lacks the last figures.\n"
