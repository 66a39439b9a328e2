"""Size of a pool of workers that hold a model: their number, and the CPUs, GPUs and memory of each. Arithmetic only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from apprentice.errors import ResourcesError
from apprentice.model_pool.engine_choice import EngineName
from apprentice.model_pool.host_memory import GIB, host_bytes

CPUS_PER_WORKER = 4  # on larger machines: a matrix product of a small batch gains little from more threads
GPU_OVERHEAD_BYTES = 2 << 30  # CUDA's context, kernels and the activations and KV cache of a small batch, beside the weights


@dataclass(frozen=True)
class FreeResources:
    """Resources free for scoring, over all nodes. `gpu_bytes` is the memory of the largest GPU (None: not known)."""

    cpus: int
    cpus_together: int  # most CPUs that one worker can have: they must lie on one node
    gpus: int
    memory_bytes: int
    gpus_together: int = 1  # most GPUs of one node
    gpu_bytes: int | None = None


@dataclass(frozen=True)
class WorkerPool:
    """The number of workers that hold the model, what each of them reserves in Ray, and the engine that decodes there.

    vLLM splits the model over `tensor_parallel` GPUs of a worker, or over as many processes on CPUs.
    """

    workers: int
    cpus: int  # of each
    gpus: int  # of each
    memory: int = 0  # bytes of each
    engine: EngineName = "transformers"
    tensor_parallel: int = 1


def size_pool(
    resources: FreeResources,
    weight_bytes: int,
    batches: int,
    *,
    engine: EngineName = "transformers",
    tensor_parallel: int = 1,
) -> WorkerPool:
    """Sizes the pool that fills `resources`: one copy of the weights in each worker, no more workers than batches.

    With GPUs every worker has `tensor_parallel` GPUs of one node and one CPU. On CPUs vLLM gets one worker with all CPUs of a
    node. Raises `ResourcesError` where not even one worker fits.
    """
    if resources.cpus < 1:
        raise ResourcesError("scoring needs 1 free CPU and the cluster has none; wait for what runs on it, or add a node.")
    if resources.gpus:
        check_fits_gpus(weight_bytes, resources.gpus_together, resources.gpu_bytes, tensor_parallel)
    # vLLM has a process for each part of the model beside its own two, and reads weights piece by piece into a GPU's memory.
    processes = tensor_parallel + 2 if engine == "vllm" else 1
    needed = host_bytes(0 if engine == "vllm" and resources.gpus else weight_bytes, processes=processes)
    copies = resources.memory_bytes // needed
    if copies < 1:
        raise ResourcesError(
            f"scoring needs {needed / GIB:.1f} GiB for one copy of the model and the cluster has"
            f" {resources.memory_bytes / GIB:.1f} GiB; choose `model.dtype: bfloat16`, a smaller model, or add a node."
        )
    if resources.gpus:
        workers = max(1, min(resources.gpus // tensor_parallel, resources.cpus, copies, batches))
        return WorkerPool(workers, 1, tensor_parallel, needed, engine, tensor_parallel)
    if engine == "vllm":
        return WorkerPool(1, min(resources.cpus, resources.cpus_together), 0, needed, engine, tensor_parallel)
    by_cpus = (
        resources.cpus if resources.cpus <= CPUS_PER_WORKER else resources.cpus // min(CPUS_PER_WORKER, resources.cpus_together)
    )
    workers = max(1, min(by_cpus, copies, batches))
    return WorkerPool(workers, min(resources.cpus // workers, CPUS_PER_WORKER, resources.cpus_together), 0, needed)


def check_fits_gpus(weight_bytes: int, gpus_together: int, gpu_bytes: int | None, tensor_parallel: int) -> None:
    """Raises `ResourcesError` where a model of `weight_bytes`, split over `tensor_parallel` GPUs, fits no node's GPUs.

    `gpus_together` is the number of GPUs of the largest node; `gpu_bytes` the memory of a GPU (None: not known, and not checked).
    """
    if tensor_parallel > gpus_together:
        raise ResourcesError(
            f"serving.tensor_parallel {tensor_parallel} splits each copy of the model over {tensor_parallel} GPUs of one node, and"
            f" the largest node has {gpus_together}; lower it, or add a node with more GPUs."
        )
    if gpu_bytes is None or weight_bytes / tensor_parallel + GPU_OVERHEAD_BYTES <= gpu_bytes:
        return
    room = gpu_bytes - GPU_OVERHEAD_BYTES
    # Attention heads come in powers of two in most models, and vLLM splits them evenly.
    parts = 2 ** math.ceil(math.log2(weight_bytes / room)) if room > 0 else gpus_together + 1
    remedy = f"set `serving.tensor_parallel: {parts}`" if parts <= gpus_together else "add a node with more or larger GPUs"
    split = f"{weight_bytes / tensor_parallel / GIB:.1f} GiB of it to" if tensor_parallel > 1 else "all of it in"
    raise ResourcesError(
        f"one copy of the model takes {weight_bytes / GIB:.1f} GiB, {split} each GPU, and a GPU here has {gpu_bytes / GIB:.1f} GiB;"
        f" {remedy}, or choose a smaller model."
    )
