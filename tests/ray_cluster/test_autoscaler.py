"""Nodes from an autoscaler: asked for, waited for and given back, against Ray's own autoscaler with nodes on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.util import get_node_ip_address

from apprentice.errors import ResourcesError
from apprentice.preflight import cluster_checks
from apprentice.preflight.lookup import RecipeLookup
from apprentice.ray_cluster import autoscaler
from apprentice.ray_cluster.autoscaler import request_nodes
from apprentice.ray_cluster.compat import autoscaling_state
from apprentice.recipe import load_recipe
from tests.support.recipes import tiny_recipe
from tests.support.sockets import free_port

HEAD_ID = "f" * 51 + "00000"  # the provider names its nodes so
DRIVER = """
import json, sys, time
import ray
from apprentice.ray_cluster.autoscaler import has_autoscaler, request_nodes
from apprentice.ray_cluster.nodes import node_resources

def gpus(nodes):
    return sum(node.get("GPU", 0) for node in nodes)

ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
while not has_autoscaler():  # it writes its first state some seconds after the cluster has begun
    time.sleep(0.2)
for count in (2, 2, 5):
    reports = []
    request_nodes([{"CPU": 2.0, "GPU": 1.0}] * count, lambda nodes: gpus(nodes) >= count, reports.append)
    print(json.dumps({"gpus": gpus(node_resources()), "reports": reports}), flush=True)
"""


@contextmanager
def autoscaling_cluster(folder: Path) -> Iterator[str]:
    """Head without GPUs, and an autoscaler that may add two nodes of 4 CPUs and a (pretended) GPU; gives the address."""
    address = f"{get_node_ip_address()}:{free_port()}"
    lists = ("file_mounts_sync_continuously", "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands")
    commands = (
        "setup_commands",
        "head_setup_commands",
        "worker_setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    )
    config: dict[str, Any] = {
        "cluster_name": "fake",
        "max_workers": 4,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": HEAD_ID,
            "gcs_address": address,
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": {"CPU": 4, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "file_mounts": {},
        "auth": {},
    } | {name: [] for name in (*lists[1:], *commands)}
    (folder / "autoscaling.json").write_text(json.dumps(config | {lists[0]: False}))
    ids = {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    switches = {"RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--num-cpus=1",
        "--include-dashboard=false",
    ]
    command += [
        f"--port={address.rpartition(':')[2]}",
        f"--autoscaling-config={folder / 'autoscaling.json'}",
        f"--temp-dir={folder}",
    ]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"} | ids | switches
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=log)
        try:
            yield address
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(head.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    head.wait(20)


@pytest.mark.cluster
def test_nodes_are_asked_for_and_waited_for_and_what_cannot_be_is_not_waited_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("as")
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    with autoscaling_cluster(folder) as address:
        command = [sys.executable, "-c", DRIVER, address]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + (folder / "head.log").read_text()[-1000:]
    first, second, third = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert first["gpus"] == 2
    [sentence] = first["reports"]
    assert sentence.startswith("waiting for nodes: the cluster's autoscaler was asked for 2 × 2 CPUs and 1 GPU,")
    assert second == {"gpus": 2, "reports": []}  # they are there
    assert third["gpus"] == 2  # five can never be: the caller refuses, as without an autoscaler


def test_a_cluster_without_an_autoscaler_is_not_asked(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert autoscaling_state() is None
    monkeypatch.setattr(autoscaler, "placement_group", lambda *_: pytest.fail("asked"))
    request_nodes([{"GPU": 1.0}], lambda nodes: False, pytest.fail)


def test_nothing_is_waited_for_once_the_request_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reserves is not free, so a caller who looks at what is free would wait for as long as the request holds it."""
    states = iter(["PENDING", "CREATED"])
    clock, given_back = [0.0], []
    group = SimpleNamespace(id=bytes(2))
    monkeypatch.setattr(autoscaler, "has_autoscaler", lambda: True)
    monkeypatch.setattr(autoscaler, "node_resources", list)
    monkeypatch.setattr(autoscaler, "is_infeasible", lambda _: False)
    monkeypatch.setattr(autoscaler, "placement_group", lambda _: group)
    monkeypatch.setattr(autoscaler, "placement_group_table", lambda _: {"state": next(states)}, raising=False)
    monkeypatch.setattr(autoscaler, "remove_placement_group", given_back.append)
    monkeypatch.setattr(autoscaler.ray, "is_initialized", lambda: True)
    stand_in = SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(autoscaler, "time", stand_in)
    request_nodes([{"GPU": 1.0}], lambda _: False, lambda _: None)
    assert clock[0] == autoscaler.POLL_S
    assert given_back == [group]


def test_check_says_that_nodes_will_come(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path) -> None:
    file = tiny_recipe(tmp_path, tiny_model, training__workers=64, training__global_batch=64)
    lookup = RecipeLookup(load_recipe(file))
    monkeypatch.setattr(cluster_checks, "node_resources", lambda: [{"CPU": 4.0}])
    monkeypatch.setattr(cluster_checks, "has_autoscaler", lambda: False)
    with pytest.raises(ResourcesError, match=r"64 workers of 1 CPUs each, .* the cluster has 4 CPUs"):
        cluster_checks.check_workers(lookup)
    monkeypatch.setattr(cluster_checks, "has_autoscaler", lambda: True)
    assert "the cluster's autoscaler is asked for nodes when training begins" in cluster_checks.check_workers(lookup)
