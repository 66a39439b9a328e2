"""CPUs, GPUs and memory that a replica reserves."""

from __future__ import annotations

import pytest

from apprentice.errors import ResourcesError
from apprentice.model_pool.host_memory import GIB
from apprentice.recipe import Replicas, Serving
from apprentice.serve.placement import Placement, place_replica

GPU_NODES = [{"CPU": 8.0, "memory": 64.0 * GIB}, {"CPU": 96.0, "GPU": 8.0, "memory": 1000.0 * GIB}]


@pytest.mark.parametrize(("threads", "replicas", "reserved"), [(None, 1, 6), (4, 1, 4), (7, 1, 6), (2, 2, 2), (None, 2, 3)])
def test_on_cpus_a_replica_has_its_share_or_its_threads(threads: int | None, replicas: int, reserved: int) -> None:
    serving = Serving(threads=threads, replicas=Replicas(min=replicas, max=replicas))
    placement = place_replica(serving, [{"CPU": 6.0}], None, GIB, engines=["transformers"])
    assert placement == Placement(reserved, 0, 2 * GIB)
    assert placement.actor_options == {"num_cpus": reserved, "memory": 2 * GIB}
    assert placement.group_options == {}


def test_a_model_on_one_gpu() -> None:
    """Our own engine loads a model in the host's memory first; vLLM reads it into the GPU's."""
    placement = place_replica(Serving(), GPU_NODES, None, 15 * GIB, engines=["transformers"], gpu_bytes=80 * GIB)
    assert placement.actor_options == {"num_cpus": 1, "num_gpus": 1, "memory": 16 * GIB}
    placement = place_replica(Serving(), GPU_NODES, 4, 15 * GIB, engines=["vllm"], gpu_bytes=80 * GIB)
    assert placement.actor_options == {"num_cpus": 4, "num_gpus": 1, "memory": 3 * GIB}
    assert placement.group_options == {}


def test_a_split_model_has_a_placement_group_on_one_node() -> None:
    serving = Serving(tensor_parallel=8)
    placement = place_replica(serving, GPU_NODES, None, 131 * GIB, engines=["vllm"], gpu_bytes=80 * GIB)
    assert placement.actor_options == {"num_cpus": 1, "num_gpus": 8, "memory": 10 * GIB}
    assert placement.group_options == {
        "placement_group_bundles": [{"CPU": 1, "GPU": 8, "memory": 10 * GIB}],
        "placement_group_strategy": "STRICT_PACK",
    }


def test_models_that_fit_no_gpu_together_are_refused() -> None:
    with pytest.raises(ResourcesError, match=r"takes 131\.0 GiB, all of it in each GPU, .* set `serving\.tensor_parallel: 2`"):
        place_replica(Serving(), GPU_NODES, None, 131 * GIB, engines=["vllm"], gpu_bytes=80 * GIB)
