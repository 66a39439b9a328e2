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


def memory_to_reserve(needed: int, nodes: Sequence[Mapping[str, float]], purpose: str, may_grow: Callable[[], bool]) -> int | None:
    """Ray's option `memory` for a task or an actor that takes `needed` bytes, which then starts on a node with as much free.

    `nodes` are Ray's resources of each node; without any `memory` among them it is None. Ray would wait for ever for
    a node that the cluster has not, so `ResourcesError` is raised, with `purpose` as its subject ("the export"), unless
    `may_grow()`: an autoscaler may add one.
    """
    largest = max((int(node.get("memory", 0.0)) for node in nodes), default=0)
    if not largest:
        return None
    if needed > largest and not may_grow():
        raise ResourcesError(
            f"{purpose} needs {needed / GIB:.1f} GiB of memory on one node to hold the model, and the largest node has"
            f" {largest / GIB:.1f} GiB; choose `model.dtype: bfloat16`, a smaller model, or add a node with more memory."
        )
    return needed
