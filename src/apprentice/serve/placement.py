"""Placement of a replica: the CPUs, GPUs and memory that it reserves on one node. Arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apprentice.model_pool.host_memory import host_bytes
from apprentice.model_pool.pool import check_fits_gpus
from apprentice.recipe import Serving

Nodes = Sequence[Mapping[str, float]]  # Ray's resources (name → amount) of each node


@dataclass(frozen=True)
class Placement:
    """What one replica reserves in Ray: `cpus`, `gpus` and `memory` (bytes; 0: none), all on one node."""

    cpus: float
    gpus: float = 0.0
    memory: int = 0

    @property
    def actor_options(self) -> dict[str, float]:
        """Ray's options of the replica's actor."""
        gpus = {"num_gpus": self.gpus} if self.gpus else {}
        return {"num_cpus": self.cpus, **gpus, **({"memory": self.memory} if self.memory else {})}

    @property
    def group_options(self) -> dict[str, Any]:
        """Ray Serve's options of a placement group for the replica, where its model is split over several GPUs; else empty.

        The group has one bundle: GPUs of a model that is split must lie on one node, and vLLM's processes are the replica's own.
        """
        if self.gpus <= 1:
            return {}
        bundle = {"CPU": self.cpus, "GPU": self.gpus, **({"memory": float(self.memory)} if self.memory else {})}
        return {"placement_group_bundles": [bundle], "placement_group_strategy": "STRICT_PACK"}


def place_replica(
    serving: Serving, nodes: Nodes, cpus: int | None, weight_bytes: int, *, engines: Sequence[str], gpu_bytes: int | None = None
) -> Placement:
    """Placement of a replica whose models, each with the engine of the same number, take `weight_bytes` together.

    A replica has `serving.tensor_parallel` GPUs if a node has GPUs, and `cpus` CPUs (None: 1 beside a GPU; else the largest node's,
    divided by the largest number of replicas, but not more than its threads). `gpu_bytes` is the memory of the largest GPU, where
    known. Raises `ResourcesError` for models that fit no node's GPUs.
    """
    split = serving.tensor_parallel
    # vLLM has a process for each part of a model, beside one of its own, and reads weights piece by piece into a GPU's memory.
    processes = 1 + sum(split + 1 for engine in engines if engine == "vllm")
    gpus = max((int(node.get("GPU", 0)) for node in nodes), default=0)
    if gpus:
        check_fits_gpus(weight_bytes, gpus, gpu_bytes, split)
        loaded = 0 if "transformers" not in engines else weight_bytes
        return Placement(cpus or 1, split, host_bytes(loaded, processes=processes))
    share = max(1, int(max(node.get("CPU", 0) for node in nodes) // max(serving.replicas.min, serving.replicas.max)))
    return Placement(cpus or min(share, serving.threads or share), 0, host_bytes(weight_bytes, processes=processes))
