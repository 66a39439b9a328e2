"""Pool of Ray actors: the free resources for it, and tables mapped through it with Ray Data. Needs Ray initialised."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray

from apprentice.errors import ApprenticeError
from apprentice.model_pool.pool import FreeResources, WorkerPool
from apprentice.models.loading import multiplies_bfloat16
from apprentice.ray_cluster.nodes import call_on_every_node, node_resources
from apprentice.recipe import Model

SETTLE_S = 5.0  # wait at most this long for resources that an earlier stage is still releasing …
PATIENCE_S = 60.0  # … and at most this long for a single CPU


def find_free_resources() -> FreeResources:
    """Free resources of the cluster.

    Earlier stages may still be releasing theirs, so this waits up to `SETTLE_S` for all CPUs, up to `PATIENCE_S` for one.
    """
    start = time.monotonic()
    while True:
        nodes, free = node_resources(), ray.available_resources()
        waited = time.monotonic() - start
        idle = free.get("CPU", 0) >= sum(node.get("CPU", 0) for node in nodes)
        if idle or waited > PATIENCE_S or (waited > SETTLE_S and free.get("CPU", 0) >= 1):
            break
        time.sleep(0.2)
    cpus = int(free.get("CPU", 0))
    node_cpus = [int(node.get("CPU", 0)) for node in nodes]
    if len(node_cpus) == 1:
        cpus = min(cpus, len(os.sched_getaffinity(0)))  # a local session may count more CPUs than there are cores
    # On a busy cluster the free CPUs may lie on different nodes, one here and one there.
    together = min((count for count in node_cpus if count), default=1) if idle else 1
    return FreeResources(cpus, together, int(free.get("GPU", 0)), int(free.get("memory", 0)))


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


def map_tables(tables: Sequence[pa.Table], worker: type, arguments: tuple[Any, ...], pool: WorkerPool) -> Iterator[pa.Table]:
    """Maps each table through a pool of actors of class `worker`, built with `arguments`; yields the results as they arrive."""
    dataset = ray.data.from_arrow(list(tables)).map_batches(
        worker,
        batch_size=None,  # one table, one call
        batch_format="pyarrow",
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(size=pool.workers),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
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
