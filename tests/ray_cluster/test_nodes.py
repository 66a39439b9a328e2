"""What a node has for us: all of it, less what drivers of jobs hold; and whether it sees the storage."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.exceptions
import ray.util.state

from apprentice.errors import ResourcesError, StorageError
from apprentice.preflight import check, cluster_checks
from apprentice.ray_cluster.nodes import call_on_every_node, node_resources
from apprentice.recipe import load_recipe
from apprentice.storage import Folder
from tests.support.recipes import tiny_recipe

NODES = [
    {"NodeID": "a", "Alive": True, "Resources": {"CPU": 4.0, "memory": 8.0}},
    {"NodeID": "b", "Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}},
    {"NodeID": "c", "Alive": False, "Resources": {"CPU": 8.0}},
]


class Supervisor:
    def __init__(self, node: str, resources: dict[str, float] | None) -> None:
        self.node_id, self.required_resources = node, resources


def test_drivers_of_jobs_hold_cpus_that_ray_data_does_not_know_of(monkeypatch):
    addresses: list[Any] = []

    def list_actors(**arguments: Any) -> list[Supervisor]:
        addresses.append(arguments)
        return [Supervisor("b", {"CPU": 1.0}), Supervisor("b", None), Supervisor("a", {"CPU": 0.5})]

    monkeypatch.setattr(ray, "nodes", lambda: NODES)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    monkeypatch.setattr(ray.util.state, "list_actors", list_actors)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert node_resources() == [{"CPU": 4.0, "memory": 8.0}, {"CPU": 2.0, "GPU": 1.0}]
    assert addresses == []  # a local session has no dashboard to ask
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "x-1"}}))
    assert node_resources() == [{"CPU": 3.5, "memory": 8.0}, {"CPU": 1.0, "GPU": 1.0}]
    (one,) = addresses
    assert one["address"] == "10.0.0.1:6379"  # this cluster's, should the machine have another Ray too
    assert one["filters"] == [("class_name", "=", "JobSupervisor"), ("state", "=", "ALIVE")]


class Answering:
    """Stands in for `call_on_every_node`: the question is asked here, once with each of the folders that nodes see."""

    def __init__(self, folders: dict[str, Folder]) -> None:
        self.folders = folders

    def __call__(self, question: Any, probe: Folder, mark: str) -> dict[str, str]:
        return {name: question(folder / probe.name, mark) for name, folder in self.folders.items()}


def test_a_storage_that_a_node_does_not_see_is_found(monkeypatch, tiny_model, tmp_path):
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model))
    storage, other = Folder.at(recipe.storage), Folder.at(tmp_path / "other")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster_checks, "call_on_every_node", Answering({"10.0.0.1": storage, "10.0.0.2": storage}))
    assert check.run_check("storage", recipe) == f"{storage}, seen by 2 nodes"
    assert not storage.exists()
    monkeypatch.setattr(cluster_checks, "call_on_every_node", Answering({"10.0.0.1": storage, "10.0.0.2": other}))
    with pytest.raises(StorageError, match=r"not the same folder on every node: 1 of 2 nodes .* 10\.0\.0\.2 among them .*other"):
        check.run_check("storage", recipe)
    assert not storage.exists()


def test_what_a_node_says_of_a_probe(tmp_path):
    probe = Folder.at(tmp_path / "probe")
    assert "does not exist" in cluster_checks._read_probe(probe, "mark")
    probe.write_text("mark")
    assert cluster_checks._read_probe(probe, "mark") == ""
    assert cluster_checks._read_probe(probe, "other") == "another file is there"
    assert [child.name for child in Folder.at(tmp_path).children()] == ["probe"]


def test_where_there_is_one_node_nobody_is_asked(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [NODES[0], NODES[2], {"NodeID": "d", "Alive": True, "Resources": {}}])
    assert call_on_every_node(lambda: 1) == {}


class RemoteFunction:
    """Stands in for a Ray task."""

    def options(self, **_: Any) -> RemoteFunction:
        return self

    def remote(self, *_: Any) -> None: ...


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ray.exceptions.GetTimeoutError("timed out"), r"does not answer \(GetTimeoutError\); look at it, or take it out"),
        (ray.exceptions.NodeDiedError("gone"), r"does not answer \(NodeDiedError\); look at it, or take it out"),
        (
            ray.exceptions.RayTaskError("multiplies_bfloat16", "Traceback …", ModuleNotFoundError("No module named 'torch'")),
            r"answers, but multiplies_bfloat16 fails there \(ModuleNotFoundError: No module named 'torch'\); make the nodes alike",
        ),
    ],
)
def test_a_node_that_answers_with_an_error_is_not_silent(monkeypatch, error, words):
    def get(*_: Any, **__: Any) -> None:
        raise error

    def multiplies_bfloat16() -> bool:
        return True

    nodes = [node | {"NodeID": node["NodeID"] * 56, "NodeManagerAddress": "10.0.0.1"} for node in NODES]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: RemoteFunction())
    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(ResourcesError, match=rf"^node 10\.0\.0\.1 \(aaaaaa\) {words}"):
        call_on_every_node(multiplies_bfloat16)
