"""`apprentice doctor`: what works here is said, and what does not comes with a remedy."""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from apprentice import pipeline
from apprentice.cli import app
from apprentice.errors import ResourcesError
from apprentice.preflight import doctor
from apprentice.preflight.doctor import Diagnosis


@contextmanager
def connection() -> Iterator[None]:
    yield


@pytest.fixture
def examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Diagnosis]]:
    """Examines this machine, with a cluster of one node and a hub that answers."""
    monkeypatch.setattr(doctor, "node_resources", lambda: [{"CPU": 4.0, "GPU": 1.0}])
    monkeypatch.setattr(httpx, "head", lambda *_, **__: httpx.Response(200))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    storage = str(tmp_path / "runs")
    return lambda: {diagnosis.subject: diagnosis for diagnosis in doctor.examine(storage, connection)}


def test_everything_that_this_machine_has_works(examined: Callable[[], dict[str, Diagnosis]], tmp_path: Path) -> None:
    diagnoses = examined()
    assert {subject for subject, diagnosis in diagnoses.items() if diagnosis.state == "broken"} == set()
    assert "transformers " in diagnoses["versions"].message
    assert diagnoses["ray"].message.endswith("1 node, 4 CPUs, 1 GPUs")
    assert diagnoses["storage"].message.startswith(str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_package_of_another_version(examined: Callable[[], dict[str, Diagnosis]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"torch": "1.0", "apprentice": "0.1.0"}.get)
    versions = examined()["versions"]
    assert versions.state == "broken"
    assert "torch 1.0 (<2.15,>=2.13 is needed)" in versions.message
    assert "ray is missing" in versions.message
    assert versions.message.endswith("install apprentice again with the project's constraints.txt.")


def test_a_hub_that_does_not_answer(examined: Callable[[], dict[str, Diagnosis]], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(httpx, "head", refuse)
    assert examined()["hub"].state == "limited"
    assert "does not answer (no route); models come from folders then" in examined()["hub"].message
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert examined()["hub"].message.startswith("switched off by HF_HUB_OFFLINE")


def test_limits_of_the_machine(examined: Callable[[], dict[str, Diagnosis]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.setattr(doctor, "LEAST_SHARED_MEMORY", 1e15)
    monkeypatch.setattr(doctor, "LEAST_DISK", 1e18)
    diagnoses = examined()
    limited = {subject for subject, diagnosis in diagnoses.items() if diagnosis.state == "limited"}
    assert limited == {"compiler", "open files", "shared memory", "cache", "storage"}
    assert "`ulimit -n 4096`" in diagnoses["open files"].message


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = doctor._port("127.0.0.1", server.getsockname()[1])
    assert taken.state == "limited"
    assert "serve with another `serving.port`" in taken.message


def test_a_storage_that_cannot_be_written_to(examined: Callable[[], dict[str, Diagnosis]], tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    storage = examined()["storage"]
    assert storage.state == "broken"
    assert storage.message.endswith("choose another `storage`.")


def test_a_ray_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail() -> None:
        raise ResourcesError("Ray did not start: no room.")

    assert doctor._ray(fail) == Diagnosis("ray", "broken", "Ray did not start: no room.")
    monkeypatch.setattr(pipeline, "examine_machine", lambda storage: iter([Diagnosis("ray", "broken", storage)]))
    outcome = CliRunner().invoke(app, ["doctor", "--storage", "/there", "--json"])
    assert outcome.exit_code == 1
    assert json.loads(outcome.stdout) == {
        "ready": False,
        "diagnoses": [{"subject": "ray", "state": "broken", "message": "/there"}],
    }
