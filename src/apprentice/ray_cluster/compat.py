"""Private API of Ray, read in version 2.60.0. tests/ray_cluster/test_compat.py fails when it changes.

ENABLE_RAY_CLUSTER                           where it is false, as on macOS, a local Ray listens on loopback alone
RAY_gcs_server_port_wait_time_s, get_node, start_raylet   how long `ray.init` waits for the processes of a local Ray
maybe_enable_token_auth_if_token_available   what `ray.init` calls before it connects, and Ray's client for jobs does not
ServeSubmissionClient                        client of Serve's REST API, which `serve deploy` uses
RAY_JOB_CONFIG_JSON_ENV_VAR, JobSupervisor   how a job's driver is told what it is, and the actor that reserves its CPUs
GcsClient, GetClusterStatusReply             what the cluster's autoscaler last wrote
"""

from __future__ import annotations

import os
import subprocess  # nosec B404
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import ray
import ray.exceptions
from ray._private import ray_constants, services
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]
from tenacity import retry, retry_if_exception, stop_after_delay, wait_fixed

JOB_CONFIG_VARIABLE = str(RAY_JOB_CONFIG_JSON_ENV_VAR)  # environment variable of a job's driver: its configuration as JSON
PORT_WAIT_VARIABLE = "RAY_gcs_server_port_wait_time_s"  # environment variable: how long Ray waits for its head's port
JOB_SUPERVISOR = "JobSupervisor"  # class name of the actor that runs a job's driver


@contextmanager
def loopback_only() -> Iterator[None]:
    """Context manager in which `ray.init` takes loopback for its node's address, so that Ray's processes listen there alone.

    Ray takes it only where clusters are switched off, and replaces it where it is asked for by name. With any other address its
    processes listen on all addresses of the machine.
    """
    with patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False):
        yield


@contextmanager
def patient_start(timeout_s: int) -> Iterator[None]:
    """Context manager in which `ray.init` waits up to `timeout_s` seconds for each process of a local Ray, instead of 30.

    A node whose raylet has ended is not waited for.
    """
    raylets: list[subprocess.Popen[bytes]] = []
    start_raylet = services.start_raylet

    def watched_start(*arguments: Any, **options: Any) -> Any:
        info = start_raylet(*arguments, **options)
        raylets.append(info.process)
        return info

    def may_still_come(error: BaseException) -> bool:
        return isinstance(error, RuntimeError) and all(raylet.poll() is None for raylet in raylets)

    waits = retry(retry=retry_if_exception(may_still_come), stop=stop_after_delay(timeout_s), wait=wait_fixed(0.1), reraise=True)
    earlier = os.environ.get(PORT_WAIT_VARIABLE)
    os.environ[PORT_WAIT_VARIABLE] = str(timeout_s)
    try:
        with patch.object(services, "get_node", waits(services.get_node)), patch.object(services, "start_raylet", watched_start):
            yield
    finally:
        os.environ.pop(PORT_WAIT_VARIABLE)
        if earlier is not None:
            os.environ[PORT_WAIT_VARIABLE] = earlier


def enable_token_auth() -> None:
    """Makes clients of this process send the Ray token found on this machine, unless RAY_AUTH_MODE says otherwise."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def make_serve_client(url: str) -> Any:
    """A client of Serve's REST API, through the dashboard at `url`."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    return ServeSubmissionClient(url)


def autoscaling_state() -> Any | None:
    """State that the cluster's autoscaler (version 2) last wrote, as Ray's protobuf message; None where there is none."""
    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    return (
        reply.autoscaling_state
        if reply.HasField("autoscaling_state") and reply.autoscaling_state.autoscaler_state_version
        else None
    )


def is_infeasible(group: str) -> bool:
    """Whether the autoscaler has said that no nodes that it may add have room for the placement group with the id `group` (hex)."""
    try:
        state = autoscaling_state()
    except ray.exceptions.RpcError:  # a head that does not answer now may answer the next time
        return False
    return state is not None and any(group in request.details for request in state.infeasible_gang_resource_requests)
