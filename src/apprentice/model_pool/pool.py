"""Size of a pool of scoring workers: their number, and the CPUs and GPUs of each. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from apprentice.errors import ResourcesError

CPUS_PER_WORKER = 4  # on larger machines: a matrix product of a small batch gains little from more threads
OVERHEAD_BYTES = 1 << 30  # interpreter, PyTorch and activations, beside the weights


@dataclass(frozen=True)
class FreeResources:
    """Resources free for scoring, over all nodes."""

    cpus: int
    cpus_together: int  # most CPUs that one worker can have: they must lie on one node
    gpus: int
    memory_bytes: int


@dataclass(frozen=True)
class WorkerPool:
    """The number of workers that hold the model, and what each of them reserves in Ray."""

    workers: int
    cpus: int  # of each
    gpus: int  # of each


def size_pool(resources: FreeResources, weight_bytes: int, batches: int) -> WorkerPool:
    """Sizes the pool that fills `resources`: one copy of the weights in each worker, no more workers than batches.

    With GPUs every worker has one GPU and one CPU. Raises `ResourcesError` where not even one worker fits.
    """
    if resources.cpus < 1:
        raise ResourcesError("scoring needs 1 free CPU and the cluster has none; wait for what runs on it, or add a node.")
    if resources.gpus:
        return WorkerPool(max(1, min(resources.gpus, resources.cpus, batches)), 1, 1)
    needed = weight_bytes + OVERHEAD_BYTES
    copies = resources.memory_bytes // needed
    if copies < 1:
        raise ResourcesError(
            f"scoring needs {needed / 2**30:.1f} GiB for one copy of the model and the cluster has"
            f" {resources.memory_bytes / 2**30:.1f} GiB; choose `model.dtype: bfloat16`, a smaller model, or add a node."
        )
    by_cpus = (
        resources.cpus if resources.cpus <= CPUS_PER_WORKER else resources.cpus // min(CPUS_PER_WORKER, resources.cpus_together)
    )
    workers = max(1, min(by_cpus, copies, batches))
    return WorkerPool(workers, min(resources.cpus // workers, CPUS_PER_WORKER, resources.cpus_together), 0)
