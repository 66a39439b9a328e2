"""Nodes of the Ray cluster that this process is connected to: their resources, and a function call on each of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Container
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from apprentice.errors import ResourcesError
from apprentice.ray_cluster.compat import JOB_CONFIG_VARIABLE, JOB_SUPERVISOR

T = TypeVar("T")
PATIENCE_S = 120.0  # seconds that a node may take to answer; most of them are the start of a process


def node_resources(*, job: bool | None = None, without: Container[str] = ()) -> list[dict[str, float]]:
    """Ray's resources (name → amount) of each live node, less the CPUs that drivers of Ray jobs reserve there.

    Ray Data does not know of the drivers' CPUs, and would wait for ever for the last one. Nodes whose ids are in `without` are left
    out. `job` says whether there may be such drivers (None: whether this process is one).
    """
    drivers = _driver_cpus() if (is_job() if job is None else job) else Counter[str]()
    nodes = []
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in without:
            resources = {name: float(value) for name, value in node["Resources"].items()}
            if reserved := drivers[node["NodeID"]]:
                resources["CPU"] = max(0.0, resources.get("CPU", 0.0) - reserved)
            nodes.append(resources)
    return nodes


def call_on_every_node(question: Callable[..., T], *arguments: Any) -> dict[str, T]:
    """Calls `question(*arguments)` on each live node with CPUs; returns the results by node ("address (first digits of its id)").

    A cluster with a single such node gives an empty dict. Raises `ResourcesError` for a node that does not answer within
    `PATIENCE_S` seconds, or on which the call fails.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)]
    if len(nodes) < 2:
        return {}
    task = ray.remote(num_cpus=0, max_retries=0)(question)
    references = {}
    for node in nodes:
        on_this_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        name = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
        references[name] = task.options(scheduling_strategy=on_this_node).remote(*arguments)
    return {name: _get_answer(name, reference, question.__name__) for name, reference in references.items()}


def _get_answer(node: str, reference: Any, question: str) -> Any:
    try:
        return ray.get(reference, timeout=PATIENCE_S)
    except ray.exceptions.RayTaskError as error:
        reason = f"{error.cause.__class__.__name__}: {' '.join(str(error.cause).split())}"
        raise ResourcesError(
            f"node {node} answers, but {question} fails there ({reason}); make the nodes alike, or take it out of the cluster."
        ) from error
    except ray.exceptions.RayError as error:
        raise ResourcesError(
            f"node {node} does not answer ({error.__class__.__name__}); look at it, or take it out of the cluster."
        ) from error


def is_job() -> bool:
    """Whether this process is the driver of a Ray job."""
    config = json.loads(os.environ.get(JOB_CONFIG_VARIABLE) or "{}")
    return bool(config.get("metadata", {}).get("job_submission_id"))


def _driver_cpus() -> Counter[str]:
    """CPUs that drivers of Ray jobs reserve, by node id."""
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address  # without it, any Ray on this machine is taken, and there may be two
    supervisors = list_actors(address=address, filters=[("class_name", "=", JOB_SUPERVISOR), ("state", "=", "ALIVE")], detail=True)
    cpus: Counter[str] = Counter()
    for actor in supervisors:
        cpus[str(actor.node_id)] += (actor.required_resources or {}).get("CPU", 0.0)
    return cpus
