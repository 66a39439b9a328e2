"""Resources that a recipe's training needs, and whether the nodes of a cluster have them: pure arithmetic.

The memory needed is a lower bound (weights, gradients and optimizer, without activations), so what is refused could not have run. A
node is a mapping of Ray's resource names to amounts: CPU, GPU, memory (bytes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from apprentice.errors import ResourcesError
from apprentice.model_pool.host_memory import largest_memory
from apprentice.recipe import Recipe
from apprentice.train.memory.estimate import PROCESS_BYTES, estimate_memory
from apprentice.train.on_policy.writer_engine import choose_writer_engine

# CPUs beside the workers: one for Ray Data's tasks, and one for each lane's actor that makes rows. With one for both, tasks and
# actors block each other.
TASK_CPUS = 1.0
GIB = 2**30


@dataclass(frozen=True)
class ResourceRequest:
    """Resources needed: `cpus`, `gpus` and `memory` for each of `workers`, and `data_cpus` and `data_gpus` besides."""

    workers: int
    cpus: float
    gpus: float
    memory: int  # bytes
    data_cpus: float = TASK_CPUS + 1
    data_gpus: float = 0.0  # for the actors that write the replies of an on-policy run,
    writers: int = 0  # of which there are so many

    def bundles(self) -> list[dict[str, float]]:
        """Resources (name → amount) of each worker and of what makes their rows, as an autoscaler is asked for them."""
        each = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        single = max(0, math.ceil(self.data_cpus - self.writers * self.cpus))
        writer = {"CPU": self.cpus} | ({"GPU": self.data_gpus / self.writers} if self.data_gpus else {})
        return [*([each] * self.workers), *([writer] * self.writers), *([{"CPU": 1.0}] * single)]


def required_resources(recipe: Recipe, parameters: int = 0, dtype: torch.dtype = torch.float32) -> ResourceRequest:
    """Resources for `recipe` at the least number of workers it may run with; `parameters` is the size of the model (0: not known).

    `memory` is that of the host, and 0 if the recipe uses GPUs.
    """
    training = recipe.training
    workers = recipe.worker_numbers[0]
    trained = parameters if recipe.tuning.method == "full" else 0
    memory = math.ceil(estimate_memory(recipe, parameters, trained, dtype, workers).total) if training.resources.gpus == 0 else 0
    data_cpus = TASK_CPUS + recipe.data.lanes
    request = ResourceRequest(workers, training.resources.cpus, training.resources.gpus, memory, data_cpus)
    if not training.aim.rounds:
        return request
    writers = training.grpo.actors
    is_split = recipe.serving.tensor_parallel > 1  # else every engine has a worker's GPUs, and none need be chosen
    data_gpus = writers * (choose_writer_engine(recipe).gpus if is_split else request.gpus)
    return replace(request, data_cpus=writers * request.cpus + TASK_CPUS, data_gpus=data_gpus, writers=writers)


def check_resources(request: ResourceRequest, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raises `ResourcesError`, with the resources needed and those there are, if `nodes` do not have what `request` needs."""
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    have = f"{cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} node{'s' if len(nodes) != 1 else ''}"
    requested = f"{request.workers} workers of {request.cpus:g} CPUs" + (f" and {request.gpus:g} GPUs" if request.gpus else "")
    more = f"{request.data_cpus:g} more CPUs" + (f" and {request.data_gpus:g} GPUs" if request.data_gpus else "")
    few = cpus < request.workers * request.cpus + request.data_cpus or gpus < request.workers * request.gpus + request.data_gpus
    if count_slots(request, nodes) < request.workers or few:
        raise ResourcesError(
            f"training asks for {requested} each, and {more} for the data; the cluster has {have}."
            " Lower training.workers or training.resources, or add nodes."
        )
    a_writer = request.data_gpus / max(request.writers, 1)
    if a_writer > (most := max((node.get("GPU", 0.0) for node in nodes), default=0.0)):
        raise ResourcesError(
            f"each process that writes replies asks for {a_writer:g} GPUs of one node (serving.tensor_parallel), and the largest"
            f" node has {most:g}; lower it, or add a node with more GPUs."
        )
    memory = sum(node.get("memory", 0.0) for node in nodes)
    if memory and request.workers * request.memory > memory:
        raise ResourcesError(
            f"training asks for at least {request.memory / GIB:.1f} GiB of memory in each of {request.workers} workers;"
            f" the cluster has {memory / GIB:.1f} GiB. Use tuning.method lora, a higher training.deepspeed.stage, a smaller"
            " model or more nodes."
        )


def has_resources(request: ResourceRequest, nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether `nodes` have what `request` needs."""
    try:
        check_resources(request, nodes)
    except ResourcesError:
        return False
    return True


def export_memory(
    parameters: int, dtype: torch.dtype, nodes: Sequence[Mapping[str, float]], *, largest: int | None = None
) -> int | None:
    """Ray's option `memory` (bytes) for the task that exports a model of so many parameters in `dtype`.

    An export by single tensors holds a module with `largest` numbers three times in float32 at most: read, what is merged into it,
    and cast. Without `largest` it holds the trained model in float32, and the written one that is compared with it. That is asked
    for, but never more than the largest node with a CPU has: a training that is over is not refused its export. None where no node
    reports its memory.
    """
    whole = parameters * (4 + dtype.itemsize)
    weights = whole if largest is None else min(3 * 4 * largest, whole)
    return min(weights + PROCESS_BYTES, largest_memory(nodes, cpus=1.0)) or None


def has_room_for_validation(recipe: Recipe, nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether `nodes` have room for one worker more than the recipe's largest number."""
    return has_resources(replace(required_resources(recipe), workers=recipe.training.max_workers + 1, memory=0), nodes)


def count_slots(request: ResourceRequest, nodes: Sequence[Mapping[str, float]]) -> int:
    """Number of workers that fit on `nodes`, none spread over two nodes; `data_cpus` and `data_gpus` are not counted."""
    total = 0
    for node in nodes:
        fits = [node.get("CPU", 0.0) // request.cpus]
        if request.gpus:
            fits.append(node.get("GPU", 0.0) // request.gpus)
        total += int(min(fits))
    return total


def workers_that_fit(recipe: Recipe, nodes: Sequence[Mapping[str, float]]) -> int:
    """The largest of the recipe's numbers of workers for which there is room. Raises `ResourcesError` if there is none."""
    request = required_resources(recipe)
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    room = min(count_slots(request, nodes), int((cpus - request.data_cpus) // request.cpus))
    if request.gpus:
        room = min(room, int((gpus - request.data_gpus) // request.gpus))
    fitting = [count for count in recipe.worker_numbers if count <= room]
    if not fitting:
        check_resources(replace(request, workers=recipe.worker_numbers[0], memory=0), nodes)
    return max(fitting)
