"""Ray's private API is as `apprentice.ray_cluster.compat` read it; where this fails, read Ray's new version and mend it."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import ray
from ray._private import node, ray_constants, services
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.dashboard.modules.job import job_supervisor
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from apprentice.ray_cluster import compat


def test_it_was_read_in_this_version() -> None:
    assert ray.__version__.rsplit(".", 1)[0] == "2.60"


def test_a_node_without_clusters_is_on_loopback() -> None:
    assert ray_constants.ENABLE_RAY_CLUSTER is True
    with compat.loopback_only():
        assert services.get_node_ip_address() == "127.0.0.1"
    assert ray_constants.ENABLE_RAY_CLUSTER is True


def test_a_local_start_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray.init` looks for its node through the module, and takes the time for its port from the environment."""
    assert [*inspect.signature(services.get_node).parameters] == ["gcs_address", "node_id"]
    source = inspect.getsource(node)
    assert "ray._private.services.get_node(" in source
    assert "except RuntimeError" in source
    variable = compat.PORT_WAIT_VARIABLE
    assert f'os.environ.get("{variable}", default_wait)' in source
    answers = iter([RuntimeError("not there yet"), RuntimeError("not there yet"), None])

    def get_node(gcs_address: str, node_id: str) -> str:
        if (error := next(answers)) is not None:
            raise error
        return node_id

    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.delenv("OURS", raising=False)
    with compat.patient_start(300):
        monkeypatch.setenv("OURS", "kept")  # as ray.init sets RAY_AUTH_MODE
        assert services.get_node("address", "id") == "id"
        assert os.environ[variable] == "300"
    assert services.get_node is get_node
    assert variable not in os.environ
    assert os.environ["OURS"] == "kept"


def test_a_node_whose_raylet_has_ended_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "process_info = ray._private.services.start_raylet(" in inspect.getsource(node)
    assert "process" in services.ProcessInfo._fields
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    looks: list[str] = []

    def get_node(gcs_address: str, node_id: str) -> None:
        looks.append(node_id)
        raise RuntimeError("not there")

    monkeypatch.setattr(services, "start_raylet", lambda: SimpleNamespace(process=ended))
    monkeypatch.setattr(services, "get_node", get_node)
    with compat.patient_start(300):
        services.start_raylet()
        with pytest.raises(RuntimeError, match="not there"):
            services.get_node("address", "id")
    assert looks == ["id"]


def test_tokens_can_be_enabled_without_a_warning() -> None:
    assert [*inspect.signature(maybe_enable_token_auth_if_token_available).parameters] == ["warn_if_disabled"]


def test_serves_client_reads_and_deploys() -> None:
    assert next(iter(inspect.signature(ServeSubmissionClient).parameters)) == "dashboard_head_address"
    assert [*inspect.signature(ServeSubmissionClient.get_serve_details).parameters] == ["self"]
    assert [*inspect.signature(ServeSubmissionClient.deploy_applications).parameters] == ["self", "config"]


def test_jobs_are_told_what_they_are() -> None:
    assert compat.JOB_CONFIG_VARIABLE == "RAY_JOB_CONFIG_JSON_ENV_VAR"
    assert job_supervisor.JobSupervisor.__name__ == compat.JOB_SUPERVISOR
    assert '"job_submission_id"' in inspect.getsource(job_supervisor) or "JOB_ID_METADATA_KEY" in inspect.getsource(job_supervisor)
