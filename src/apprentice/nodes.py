"""The nodes of the cluster that this process is connected to, and what each has for us.

Knows nothing of what is asked of them.
"""

from __future__ import annotations

import json
import os
from collections import Counter

import ray


def node_resources() -> list[dict[str, float]]:
    """Ray's resources of each live node, less the CPUs that the drivers of Ray jobs hold there.

    Ray Data does not know of those, and would wait without end for the last CPU that a driver has.
    """
    drivers = _driver_cpus() if _is_job() else Counter[str]()
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            resources = {name: float(value) for name, value in node["Resources"].items()}
            if held := drivers[node["NodeID"]]:
                resources["CPU"] = max(0.0, resources.get("CPU", 0.0) - held)
            found.append(resources)
    return found


def _is_job() -> bool:
    """Whether this process is the driver of a Ray job."""
    told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return bool(told.get("metadata", {}).get("job_submission_id"))


def _driver_cpus() -> Counter[str]:
    """CPUs that drivers of jobs hold, by node."""
    from ray.util.state import list_actors

    supervisors = list_actors(filters=[("class_name", "=", "JobSupervisor"), ("state", "=", "ALIVE")], detail=True)
    held: Counter[str] = Counter()
    for actor in supervisors:
        held[str(actor.node_id)] += (actor.required_resources or {}).get("CPU", 0.0)
    return held
