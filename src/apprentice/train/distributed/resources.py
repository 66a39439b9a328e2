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
from apprentice.recipe import Recipe
from apprentice.train.memory.estimate import held

DATA_CPUS = 2.0  # beside the workers, for an actor that makes rows and Ray Data's tasks; with one CPU they block each other
GIB = 2**30


@dataclass(frozen=True)
class ResourceRequest:
    """Resources needed: `cpus`, `gpus` and `memory` for each of `workers`, and `data_cpus` and `data_gpus` besides."""

    workers: int
    cpus: float
    gpus: float
    memory: int  # bytes
    data_cpus: float = DATA_CPUS
    data_gpus: float = 0.0  # for the actors that write the replies of an on-policy run


def required_resources(recipe: Recipe, parameters: int = 0, dtype: torch.dtype = torch.float32) -> ResourceRequest:
    """Resources for `recipe` at its least number of workers; `parameters` is the size of the model (0: not known).

    `memory` is that of the host, and 0 if the recipe uses GPUs.
    """
    training = recipe.training
    workers = training.min_workers
    trained = parameters if recipe.tuning.method == "full" else 0
    memory = math.ceil(held(recipe, parameters, trained, dtype, workers).total) if training.resources.gpus == 0 else 0
    ask = ResourceRequest(workers, training.resources.cpus, training.resources.gpus, memory)
    if not training.aim.rounds:
        return ask
    writers = training.grpo.actors
    return replace(ask, data_cpus=writers * ask.cpus + 1, data_gpus=writers * ask.gpus)


def check_resources(ask: ResourceRequest, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raises `ResourcesError`, with the resources needed and those there are, if `nodes` do not have what `ask` needs."""
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    have = f"{cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} node{'s' if len(nodes) != 1 else ''}"
    asked = f"{ask.workers} workers of {ask.cpus:g} CPUs" + (f" and {ask.gpus:g} GPUs" if ask.gpus else "")
    more = f"{ask.data_cpus:g} more CPUs" + (f" and {ask.data_gpus:g} GPUs" if ask.data_gpus else "")
    few = cpus < ask.workers * ask.cpus + ask.data_cpus or gpus < ask.workers * ask.gpus + ask.data_gpus
    if slots(ask, nodes) < ask.workers or few:
        raise ResourcesError(
            f"training asks for {asked} each, and {more} for the data; the cluster has {have}."
            " Lower training.workers or training.resources, or add nodes."
        )
    memory = sum(node.get("memory", 0.0) for node in nodes)
    if memory and ask.workers * ask.memory > memory:
        raise ResourcesError(
            f"training asks for at least {ask.memory / GIB:.1f} GiB of memory in each of {ask.workers} workers; the cluster has"
            f" {memory / GIB:.1f} GiB. Use tuning.method lora, a higher training.deepspeed.stage, a smaller model or more nodes."
        )


def has_room_for_validation(recipe: Recipe, nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether `nodes` have room for one worker more than the recipe's largest number."""
    try:
        check_resources(replace(required_resources(recipe), workers=recipe.training.max_workers + 1, memory=0), nodes)
    except ResourcesError:
        return False
    return True


def slots(ask: ResourceRequest, nodes: Sequence[Mapping[str, float]]) -> int:
    """Number of workers that fit on `nodes`, none spread over two nodes; `data_cpus` and `data_gpus` are not counted."""
    total = 0
    for node in nodes:
        fits = [node.get("CPU", 0.0) // ask.cpus]
        if ask.gpus:
            fits.append(node.get("GPU", 0.0) // ask.gpus)
        total += int(min(fits))
    return total


def workers_that_fit(recipe: Recipe, nodes: Sequence[Mapping[str, float]]) -> int:
    """The largest number of workers in the recipe's range that fits and divides its largest number.

    Divisors only, so that each step has the same rows on any number of workers. Raises `ResourcesError` if none fits.
    """
    training = recipe.training
    ask = required_resources(recipe)
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    room = min(slots(ask, nodes), int((cpus - ask.data_cpus) // ask.cpus))
    if ask.gpus:
        room = min(room, int((gpus - ask.data_gpus) // ask.gpus))
    fitting = [
        count
        for count in range(training.min_workers, training.max_workers + 1)
        if training.max_workers % count == 0 and count <= room
    ]
    if not fitting:
        counts = [count for count in range(training.min_workers, training.max_workers + 1) if training.max_workers % count == 0]
        check_resources(replace(ask, workers=counts[0], memory=0), nodes)
    return max(fitting)
