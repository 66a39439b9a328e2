"""Memory that tasks and actors with a model reserve, and what is said where no node has as much."""

from __future__ import annotations

import pytest

from apprentice.errors import ResourcesError
from apprentice.model_pool.host_memory import GIB, host_bytes, memory_to_reserve

NODES = [{"CPU": 8.0, "memory": 6.0 * GIB}, {"CPU": 8.0, "memory": 14.0 * GIB}, {"CPU": 1.0}]


def test_a_process_takes_its_weights_and_itself() -> None:
    assert host_bytes(15 * GIB) == 16 * GIB
    assert host_bytes(0, processes=3) == 3 * GIB


def test_the_largest_node_decides() -> None:
    assert memory_to_reserve(14 * GIB, NODES, "the export", lambda: False) == 14 * GIB
    with pytest.raises(ResourcesError) as refused:
        memory_to_reserve(15 * GIB, NODES, "the export", lambda: False)
    assert str(refused.value) == (
        "the export needs 15.0 GiB of memory on one node to hold the model, and the largest node has 14.0 GiB; choose"
        " `model.dtype: bfloat16`, a smaller model, or add a node with more memory."
    )
    assert memory_to_reserve(15 * GIB, NODES, "the export", lambda: True) == 15 * GIB  # an autoscaler may add a node


def test_a_node_without_the_cpus_and_gpus_does_not_count() -> None:
    """A head to which KubeRay gives no CPUs takes no task, however much memory it has."""
    nodes = [{"CPU": 0.0, "memory": 64.0 * GIB}, *NODES, {"CPU": 8.0, "GPU": 1.0, "memory": 10.0 * GIB}]
    with pytest.raises(ResourcesError, match=r"the largest node has 14\.0 GiB"):
        memory_to_reserve(15 * GIB, nodes, "the export", lambda: False)
    with pytest.raises(ResourcesError, match=r"the largest node has 10\.0 GiB"):
        memory_to_reserve(12 * GIB, nodes, "a worker", lambda: False, gpus=1.0)
    assert memory_to_reserve(10 * GIB, nodes, "a worker", lambda: False, gpus=1.0) == 10 * GIB


def test_nodes_that_report_no_memory_reserve_none() -> None:
    assert memory_to_reserve(15 * GIB, [{"CPU": 8.0}], "the export", lambda: False) is None
