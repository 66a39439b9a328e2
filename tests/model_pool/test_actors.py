"""The wait for free resources, GPUs among them, over a stand-in for the cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from apprentice.errors import ResourcesError
from apprentice.model_pool import actors
from apprentice.model_pool.actors import find_free_resources, has_gpus
from apprentice.model_pool.pool import FreeResources, WorkerPool

GPU_NODE = {"CPU": 16.0, "GPU": 8.0, "memory": 100.0}
CPU_NODE = {"CPU": 4.0, "memory": 10.0}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Sets the nodes, and their free CPUs and GPUs at each look, the last for ever; returns the looks' times in seconds."""

    def make(nodes: list[dict[str, float]], *free: tuple[float, float]) -> list[float]:
        looks: list[float] = []
        clock = [0.0]

        def available() -> dict[str, float]:
            looks.append(clock[0])
            cpus, gpus = free[min(len(looks), len(free)) - 1]
            return {"CPU": cpus, "GPU": gpus, "memory": 100.0}

        def sleep(seconds: float) -> None:
            clock[0] += seconds

        stand_in: Any = type("ray", (), {"available_resources": staticmethod(available)})
        monkeypatch.setattr(actors, "ray", stand_in)
        monkeypatch.setattr(actors, "node_resources", lambda: nodes)
        monkeypatch.setattr(actors, "request_nodes", lambda *_: None)
        monkeypatch.setattr(actors, "has_autoscaler", lambda: False)
        monkeypatch.setattr(actors, "largest_gpu_bytes", lambda: 80)
        monkeypatch.setattr(actors.time, "sleep", sleep)
        monkeypatch.setattr(actors.time, "monotonic", lambda: clock[0])
        return looks

    return make


def said() -> tuple[list[str], Callable[[str], None]]:
    lines: list[str] = []
    return lines, lines.append


def test_gpus_that_training_still_releases_are_waited_for(cluster: Callable[..., list[float]]) -> None:
    looks = cluster([GPU_NODE], (16, 0), (16, 0), (16, 3), (16, 8))
    lines, tell = said()
    assert find_free_resources(tell, gpus=1.0) == FreeResources(actors._usable_cpus([GPU_NODE], 16), 16, 8, 100, 8, 80)
    assert len(looks) == 4
    assert lines == []


def test_after_a_while_the_gpus_of_one_worker_are_enough(cluster: Callable[..., list[float]]) -> None:
    looks = cluster([GPU_NODE], (16, 4))
    assert find_free_resources(lambda _: None, gpus=1.0, tensor_parallel=4).gpus == 4
    assert actors.SETTLE_S < looks[-1] < actors.SETTLE_S + 1


def test_gpus_that_stay_taken_are_told_and_no_cpu_answers_instead(cluster: Callable[..., list[float]]) -> None:
    looks = cluster([GPU_NODE], (16, 2))
    with pytest.raises(ResourcesError, match=r"of the cluster's 8 only 2 are free; wait for what runs on them"):
        find_free_resources(lambda _: None, gpus=1.0, tensor_parallel=4)
    assert looks[-1] > actors.PATIENCE_S


@pytest.mark.parametrize("grows", [True, False])
def test_an_autoscaler_adds_a_node_for_gpus_that_stay_taken(
    grows: bool, cluster: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait goes by what is free: the nodes have enough GPUs, and others use them."""
    nodes = [GPU_NODE]
    looks = cluster(nodes, (16, 2))
    requests: list[Any] = []

    def request(bundles: Any, has_enough: Any, tell: Any) -> None:
        if has_enough(nodes):
            return
        requests.append(bundles)
        if grows:
            nodes.append(GPU_NODE)
            monkeypatch.setattr(actors.ray, "available_resources", lambda: {"CPU": 32.0, "GPU": 10.0, "memory": 200.0})

    monkeypatch.setattr(actors, "has_autoscaler", lambda: True)
    monkeypatch.setattr(actors, "request_nodes", request)
    if grows:
        assert find_free_resources(lambda _: None, gpus=1.0, tensor_parallel=4).gpus == 10
    else:
        with pytest.raises(ResourcesError, match="only 2 are free"):
            find_free_resources(lambda _: None, gpus=1.0, tensor_parallel=4)
    assert requests == [[{"CPU": 1.0, "GPU": 4.0}]]
    assert looks[-1] > actors.PATIENCE_S


def test_gpus_that_the_request_itself_held_are_free_a_moment_later(
    cluster: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = cluster([GPU_NODE], (16, 0))
    after: list[float] = []

    def request(_: Any, has_enough: Any, tell: Any) -> None:
        if has_enough([GPU_NODE]):
            return

        def available() -> dict[str, float]:
            after.append(8.0 if len(after) == 2 else 0.0)
            return {"CPU": 16.0, "GPU": after[-1]}

        monkeypatch.setattr(actors.ray, "available_resources", available)

    monkeypatch.setattr(actors, "has_autoscaler", lambda: True)
    monkeypatch.setattr(actors, "request_nodes", request)
    assert find_free_resources(lambda _: None, gpus=1.0).gpus == 8
    assert len(after) == 3
    assert looks[-1] > actors.PATIENCE_S


def test_each_worker_has_its_gpus_on_one_node() -> None:
    nodes = [CPU_NODE, GPU_NODE, {"CPU": 4.0, "GPU": 3.0}]
    assert [has_gpus(4, workers)(nodes) for workers in (1, 2, 3)] == [True, True, False]
    assert [has_gpus(1, workers)(nodes) for workers in (11, 12)] == [True, False]
    assert not has_gpus(1)([CPU_NODE])


def test_a_recipe_without_gpus_takes_cpus_where_others_have_the_gpus(cluster: Callable[..., list[float]]) -> None:
    looks = cluster([GPU_NODE], (8, 0))
    assert find_free_resources(lambda _: None).gpus == 0
    assert looks[-1] < actors.SETTLE_S + 1


def test_a_cluster_without_gpus_answers_a_recipe_that_asks_for_them_aloud(cluster: Callable[..., list[float]]) -> None:
    cluster([CPU_NODE, CPU_NODE], (8, 0))
    lines, tell = said()
    assert find_free_resources(tell, gpus=8.0) == FreeResources(8, 4, 0, 100, 0, None)
    assert lines == ["the recipe asks for GPUs (training.resources.gpus 8) and this cluster has none: CPUs answer instead"]


def test_workers_reserve_the_memory_of_their_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {}

    class Dataset:
        context = SimpleNamespace()

        def map_batches(self, worker: type, **resources: Any) -> Dataset:
            options.update(resources)
            return self

        def iter_batches(self, **_: Any) -> Iterator[Any]:
            return iter(())

    data = SimpleNamespace(from_arrow=lambda _: Dataset(), ActorPoolStrategy=lambda size: size)
    monkeypatch.setattr(actors, "ray", SimpleNamespace(data=data))
    monkeypatch.setattr(actors, "node_resources", lambda: [GPU_NODE])
    assert list(actors.map_tables([], object, (), WorkerPool(2, 1, 4, 90, "vllm", 4))) == []
    assert {name: options[name] for name in ("compute", "num_cpus", "num_gpus", "memory")} == {
        "compute": 2,
        "num_cpus": 1,
        "num_gpus": 4,
        "memory": 90,
    }
    monkeypatch.setattr(actors, "has_autoscaler", lambda: False)
    with pytest.raises(ResourcesError, match="a worker needs"):
        list(actors.map_tables([], object, (), WorkerPool(2, 1, 4, 110, "vllm", 4)))
    assert list(actors.map_tables([], object, (), WorkerPool(1, 1, 0))) == []  # of an endpoint: it holds no model
    assert options["memory"] is None
