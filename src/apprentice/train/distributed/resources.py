"""What a recipe's training asks of a cluster, and whether the cluster's nodes can give it: pure arithmetic.

Memory is a lower bound (weights, gradients, optimizer; activations come on top): what is refused could not have run.
Knows nothing of Ray beyond the shape of a node's resources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from apprentice.errors import ResourcesError
from apprentice.recipe import Recipe
from apprentice.train.memory.estimate import held

DATA_CPUS = 2.0  # beside the workers: an actor that makes rows and the tasks around it; with one they wait for each other
GIB = 2**30


@dataclass(frozen=True)
class Ask:
    """What `workers` need each, and what is needed besides."""

    workers: int
    cpus: float
    gpus: float
    memory: int  # bytes
    data_cpus: float = DATA_CPUS
    data_gpus: float = 0.0  # of those who write the replies of an on-policy run


def required_resources(recipe: Recipe, parameters: int = 0, dtype: torch.dtype = torch.float32) -> Ask:
    """What `recipe` asks for at its least number of workers, for a model of `parameters` numbers (0: not known)."""
    training = recipe.training
    workers = training.min_workers
    trained = parameters if recipe.tuning.method == "full" else 0
    memory = math.ceil(held(recipe, parameters, trained, dtype, workers).total) if training.resources.gpus == 0 else 0
    ask = Ask(workers, training.resources.cpus, training.resources.gpus, memory)
    if not training.aim.rounds:
        return ask
    writers = training.grpo.actors
    return replace(ask, data_cpus=writers * ask.cpus + 1, data_gpus=writers * ask.gpus)


def check_resources(ask: Ask, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raises `ResourcesError` with what is asked and what is there, if `nodes` (Ray resources of each) cannot hold `ask`."""
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


def room_aside(recipe: Recipe, nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether one more worker fits beside the most that the run may have."""
    try:
        check_resources(replace(required_resources(recipe), workers=recipe.training.max_workers + 1, memory=0), nodes)
    except ResourcesError:
        return False
    return True


def slots(ask: Ask, nodes: Sequence[Mapping[str, float]]) -> int:
    """Workers that fit, each whole on one node."""
    total = 0
    for node in nodes:
        fits = [node.get("CPU", 0.0) // ask.cpus]
        if ask.gpus:
            fits.append(node.get("GPU", 0.0) // ask.gpus)
        total += int(min(fits))
    return total


def workers_that_fit(recipe: Recipe, nodes: Sequence[Mapping[str, float]]) -> int:
    """The most workers within the recipe's range that fit and divide its largest number, so that steps stay the same rows."""
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
