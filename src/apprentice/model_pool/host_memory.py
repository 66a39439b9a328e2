"""Host memory of processes that hold a model, and the `memory` that their Ray tasks and actors reserve by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from apprentice.errors import ResourcesError

GIB = 2**30
PROCESS_BYTES = 1 << 30  # interpreter, PyTorch and activations of a process, beside the weights


def host_bytes(weight_bytes: int, *, processes: int = 1) -> int:
    """Bytes that `processes` processes take which hold `weight_bytes` of weights together.

    A model for a GPU counts too, unless it is read piece by piece: it is loaded in the host's memory first.
    """
    return weight_bytes + processes * PROCESS_BYTES


def memory_to_reserve(
    needed: int,
    nodes: Sequence[Mapping[str, float]],
    purpose: str,
    may_grow: Callable[[], bool],
    *,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> int | None:
    """Ray's option `memory` for a task or an actor that takes `needed` bytes, which then starts on a node with as much free.

    `nodes` are Ray's resources of each node, `cpus` and `gpus` what is reserved beside the memory; where the nodes that have those
    report no memory it is None. Ray would wait for ever for a node that the cluster has not, so `ResourcesError` is raised, with
    `purpose` as its subject ("the export"), unless `may_grow()`: an autoscaler may add one.
    """
    largest = largest_memory(nodes, cpus=cpus, gpus=gpus)
    if not largest:
        return None
    if needed > largest and not may_grow():
        raise ResourcesError(
            f"{purpose} needs {needed / GIB:.1f} GiB of memory on one node to hold the model, and the largest node has"
            f" {largest / GIB:.1f} GiB; choose `model.dtype: bfloat16`, a smaller model, or add a node with more memory."
        )
    return needed


def largest_memory(nodes: Sequence[Mapping[str, float]], *, cpus: float, gpus: float = 0.0) -> int:
    """Most bytes of Ray's `memory` on a node that has `cpus` and `gpus`, such as not the head of a cluster that gives it no CPUs.

    Of all nodes where none has them; 0 where no memory is reported.
    """
    fitting = [node for node in nodes if node.get("CPU", 0.0) >= cpus and node.get("GPU", 0.0) >= gpus] or nodes
    return max((int(node.get("memory", 0.0)) for node in fitting), default=0)
