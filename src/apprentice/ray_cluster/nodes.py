"""The nodes of the cluster that this process is connected to: what each has for us, and what each answers.

Knows nothing of what is asked of them.
"""

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

T = TypeVar("T")
PATIENCE_S = 120.0  # how long a node may take to answer; most of it is the start of a process


def node_resources(*, job: bool | None = None, without: Container[str] = ()) -> list[dict[str, float]]:
    """Ray's resources of each live node but those `without` names by id, less the CPUs that the drivers of Ray jobs hold there.

    Ray Data does not know of those, and would wait without end for the last CPU that a driver has. `job` says whether there are
    such drivers (None: whether this process is one).
    """
    drivers = _driver_cpus() if (is_job() if job is None else job) else Counter[str]()
    found = []
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in without:
            resources = {name: float(value) for name, value in node["Resources"].items()}
            if held := drivers[node["NodeID"]]:
                resources["CPU"] = max(0.0, resources.get("CPU", 0.0) - held)
            found.append(resources)
    return found


def on_every_node(question: Callable[..., T], *arguments: Any) -> dict[str, T]:
    """The answer of each live node that does work (has CPUs), by its address; nothing where there is only one.

    Raises `ResourcesError` for a node that does not answer.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)]
    if len(nodes) < 2:
        return {}
    ask = ray.remote(num_cpus=0, max_retries=0)(question)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"] = ask.options(scheduling_strategy=there).remote(*arguments)
    answers = {}
    for name, reference in asked.items():
        try:
            answers[name] = ray.get(reference, timeout=PATIENCE_S)
        except ray.exceptions.RayError as error:
            raise ResourcesError(
                f"node {name} does not answer ({error.__class__.__name__}); look at it, or take it out of the cluster."
            ) from error
    return answers


def is_job() -> bool:
    """Whether this process is the driver of a Ray job."""
    told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return bool(told.get("metadata", {}).get("job_submission_id"))


def _driver_cpus() -> Counter[str]:
    """CPUs that drivers of jobs hold, by node."""
    from ray.util.state import list_actors

    here = ray.get_runtime_context().gcs_address  # unless told, it looks for any Ray on this machine, and there may be two
    supervisors = list_actors(address=here, filters=[("class_name", "=", "JobSupervisor"), ("state", "=", "ALIVE")], detail=True)
    held: Counter[str] = Counter()
    for actor in supervisors:
        held[str(actor.node_id)] += (actor.required_resources or {}).get("CPU", 0.0)
    return held
