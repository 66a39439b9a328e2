"""Size of a pool of scoring workers: their number, and the CPUs and GPUs of each. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from apprentice.errors import ResourcesError

CPUS_PER_WORKER = 4  # on larger machines: a matrix product of a small batch gains little from more threads
OVERHEAD_BYTES = 1 << 30  # interpreter, PyTorch and activations, beside the weights


@dataclass(frozen=True)
class Room:
    """Resources free for scoring, over all nodes."""

    cpus: int
    cpus_together: int  # most CPUs that one worker can have: they must lie on one node
    gpus: int
    memory_bytes: int


@dataclass(frozen=True)
class Pool:
    workers: int
    cpus: int  # of each
    gpus: int  # of each


def pool_for(room: Room, weight_bytes: int, batches: int) -> Pool:
    """Sizes the pool that fills `room`: one copy of the weights in each worker, no more workers than batches.

    With GPUs every worker has one GPU and one CPU. Raises `ResourcesError` where not even one worker fits.
    """
    if room.cpus < 1:
        raise ResourcesError("scoring needs 1 free CPU and the cluster has none; wait for what runs on it, or add a node.")
    if room.gpus:
        return Pool(max(1, min(room.gpus, room.cpus, batches)), 1, 1)
    needed = weight_bytes + OVERHEAD_BYTES
    held = room.memory_bytes // needed
    if held < 1:
        raise ResourcesError(
            f"scoring needs {needed / 2**30:.1f} GiB for one copy of the model and the cluster has"
            f" {room.memory_bytes / 2**30:.1f} GiB; choose `model.dtype: bfloat16`, a smaller model, or add a node."
        )
    by_cpus = room.cpus if room.cpus <= CPUS_PER_WORKER else room.cpus // min(CPUS_PER_WORKER, room.cpus_together)
    workers = max(1, min(by_cpus, held, batches))
    return Pool(workers, min(room.cpus // workers, CPUS_PER_WORKER, room.cpus_together), 0)
