"""Pool of Ray actors: the free resources for it, and tables mapped through it with Ray Data. Needs Ray initialised."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray

from apprentice.errors import ApprenticeError, ResourcesError
from apprentice.model_pool.host_memory import host_bytes, memory_to_reserve
from apprentice.model_pool.model import gpu_bytes
from apprentice.model_pool.pool import FreeResources, WorkerPool
from apprentice.models.loading import multiplies_bfloat16
from apprentice.ray_cluster.autoscaler import has_autoscaler, request_nodes
from apprentice.ray_cluster.nodes import call_on_every_node, node_resources
from apprentice.recipe import Model

SETTLE_S = 5.0  # wait at most this long for resources that an earlier stage is still releasing …
PATIENCE_S = 60.0  # … and at most this long for a single CPU, and for the GPUs of one worker
POLL_S = 0.2
NO_GPUS = "the recipe asks for GPUs (training.resources.gpus {gpus:g}) and this cluster has none: CPUs answer instead"


def find_free_resources(tell: Callable[[str], None], *, gpus: float = 0.0, tensor_parallel: int = 1) -> FreeResources:
    """Free resources of the cluster, for workers that are split over `tensor_parallel` GPUs; `gpus` is what the recipe asks for.

    Earlier stages may still be releasing theirs, so this waits up to `SETTLE_S` for all CPUs and GPUs, up to `PATIENCE_S` for one
    CPU and, where the recipe asks for GPUs, for those of one worker. An autoscaler is asked for GPUs that are not there. A recipe
    that asks for GPUs on a cluster without any is answered on CPUs, and `tell` is called with a sentence that says so. Where all
    GPUs stay taken, an autoscaler is asked for another node, and without one `ResourcesError` is raised.
    """
    if gpus:
        request_nodes([{"CPU": 1.0, "GPU": float(tensor_parallel)}], has_gpus(tensor_parallel), tell)
    start = time.monotonic()
    while True:
        nodes, free = node_resources(), ray.available_resources()
        waited = time.monotonic() - start
        gpus_there = max((int(node.get("GPU", 0)) for node in nodes), default=0)
        needed = min(tensor_parallel, gpus_there) if gpus or tensor_parallel > 1 else 0
        has_room = free.get("CPU", 0) >= 1 and free.get("GPU", 0) >= needed
        idle = all(free.get(kind, 0) >= sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        if idle or waited > PATIENCE_S or (waited > SETTLE_S and has_room):
            break
        time.sleep(POLL_S)
    if free.get("GPU", 0) < needed and has_autoscaler():
        free = _request_gpus(needed, tell)
        nodes, idle = node_resources(), False
    free_gpus = int(free.get("GPU", 0))
    if free_gpus < needed:
        total = sum(int(node.get("GPU", 0)) for node in nodes)
        raise ResourcesError(
            f"the recipe asks for GPUs (training.resources.gpus {gpus:g}, serving.tensor_parallel {tensor_parallel}), and of the"
            f" cluster's {total} only {free_gpus} are free; wait for what runs on them, or set both to ask for fewer."
        )
    if gpus and not gpus_there:
        tell(NO_GPUS.format(gpus=gpus))
    return FreeResources(
        _usable_cpus(nodes, int(free.get("CPU", 0))),
        # On a busy cluster the free CPUs may lie on different nodes, one here and one there.
        min((int(node["CPU"]) for node in nodes if int(node.get("CPU", 0))), default=1) if idle else 1,
        free_gpus,
        int(free.get("memory", 0)),
        gpus_there,
        largest_gpu_bytes() if free_gpus else None,
    )


def _request_gpus(count: int, tell: Callable[[str], None]) -> dict[str, float]:
    """Asks the autoscaler for a node with `count` GPUs, or waits for as many of the nodes' own; returns what is free then.

    The request itself reserves them, and Ray gives them back a moment after it is withdrawn.
    """
    bundle = {"CPU": 1.0, "GPU": float(count)}
    request_nodes([bundle], lambda _: ray.available_resources().get("GPU", 0) >= count, tell)
    start = time.monotonic()
    free: dict[str, float] = ray.available_resources()
    while free.get("GPU", 0) < count and time.monotonic() - start < SETTLE_S:
        time.sleep(POLL_S)
        free = ray.available_resources()
    return free


def has_gpus(count: int, workers: int = 1) -> Callable[[Sequence[dict[str, float]]], bool]:
    """A function of the nodes' resources that says whether `workers` workers find `count` GPUs of one node each."""
    return lambda nodes: sum(int(node.get("GPU", 0.0)) // count for node in nodes) >= workers


def _usable_cpus(nodes: Sequence[dict[str, float]], free: int) -> int:
    """The free CPUs; a local session may count more than there are cores."""
    return min(free, len(os.sched_getaffinity(0))) if len(nodes) == 1 else free


def largest_gpu_bytes() -> int | None:
    """Memory of the cluster's largest GPU in bytes, as the nodes say that have one; None where none can say."""
    ask = ray.remote(num_cpus=0)(gpu_bytes)
    sizes = list(call_on_every_node(gpu_bytes).values()) or [ray.get(ask.remote())]
    return max((size for size in sizes if size), default=None)


def resolve_model_dtype(model: Model, resources: FreeResources) -> Model:
    """Resolves `dtype: auto` to one dtype for all workers; any other `model` is returned unchanged.

    bfloat16 on GPUs and where the CPUs of all nodes multiply it in hardware, else float32. The driver's own hardware is not
    decisive: it may be a node without a GPU, or with another CPU than the workers'.
    """
    if model.dtype != "auto":
        return model
    if resources.gpus:
        return model.model_copy(update={"dtype": "bfloat16"})
    ask = ray.remote(num_cpus=1)(multiplies_bfloat16)
    fast = list(call_on_every_node(multiplies_bfloat16).values()) or [ray.get(ask.remote())]
    return model.model_copy(update={"dtype": "bfloat16" if all(fast) else "float32"})


def reserve_memory(weight_bytes: int, purpose: str, *, cpus: float, gpus: float) -> int | None:
    """Ray's option `memory` for a task or an actor that loads `weight_bytes` of weights; `purpose` names it in an error.

    None where the nodes report no memory. Raises `ResourcesError` where no node with `cpus` and `gpus` has as much, and none can be
    added.
    """
    return memory_to_reserve(host_bytes(weight_bytes), node_resources(), purpose, has_autoscaler, cpus=cpus, gpus=gpus)


def map_tables(tables: Sequence[pa.Table], worker: type, arguments: tuple[Any, ...], pool: WorkerPool) -> Iterator[pa.Table]:
    """Maps each table through a pool of actors of class `worker`, built with `arguments`; yields the results as they arrive."""
    memory = None
    if pool.memory:
        memory = memory_to_reserve(pool.memory, node_resources(), "a worker", has_autoscaler, cpus=pool.cpus, gpus=pool.gpus)
    dataset = ray.data.from_arrow(list(tables)).map_batches(
        worker,
        batch_size=None,  # one table, one call
        batch_format="pyarrow",
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(size=pool.workers),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        memory=memory,
    )
    dataset.context.enable_progress_bars = False
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def gather_results(references: list[Any]) -> list[Any]:
    """Results of Ray tasks, in order; raises an `ApprenticeError` of a task as it is, without Ray's wrapper."""
    try:
        return list(ray.get(references))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ApprenticeError):
            raise error.cause from None
        raise
