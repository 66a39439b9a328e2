"""What a node has for us: all of it, less what drivers of jobs hold."""

from __future__ import annotations

import json
from typing import Any

import ray
import ray.util.state

from apprentice.nodes import node_resources

NODES = [
    {"NodeID": "a", "Alive": True, "Resources": {"CPU": 4.0, "memory": 8.0}},
    {"NodeID": "b", "Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}},
    {"NodeID": "c", "Alive": False, "Resources": {"CPU": 8.0}},
]


class Supervisor:
    def __init__(self, node: str, resources: dict[str, float] | None) -> None:
        self.node_id, self.required_resources = node, resources


def test_drivers_of_jobs_hold_cpus_that_ray_data_does_not_know_of(monkeypatch):
    asked: list[Any] = []

    def list_actors(**arguments: Any) -> list[Supervisor]:
        asked.append(arguments)
        return [Supervisor("b", {"CPU": 1.0}), Supervisor("b", None), Supervisor("a", {"CPU": 0.5})]

    monkeypatch.setattr(ray, "nodes", lambda: NODES)
    monkeypatch.setattr(ray.util.state, "list_actors", list_actors)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert node_resources() == [{"CPU": 4.0, "memory": 8.0}, {"CPU": 2.0, "GPU": 1.0}]
    assert asked == []  # a local session has no dashboard to ask
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "x-1"}}))
    assert node_resources() == [{"CPU": 3.5, "memory": 8.0}, {"CPU": 1.0, "GPU": 1.0}]
    assert asked == [{"filters": [("class_name", "=", "JobSupervisor"), ("state", "=", "ALIVE")], "detail": True}]
