"""Ray's private API is as `apprentice.ray_cluster.compat` read it; where this fails, read Ray's new version and mend it."""

from __future__ import annotations

import inspect

import ray
from ray._private import ray_constants, services
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
