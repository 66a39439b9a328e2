"""Memory as measured: free and peak memory, and the changes of a recipe to suggest when a worker ran out.

estimate.py computes weights, gradients and optimizer; activations.py computes activations.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from apprentice.errors import TrainingError
from apprentice.models.loading import count_parameters, resolve_dtype
from apprentice.pretrained.hub import local_folder
from apprentice.recipe import Recipe, data_parallel_size
from apprentice.train.checkpoint.shard_writer import WINDOW_BYTES
from apprentice.train.memory.activations import estimate_activations
from apprentice.train.memory.estimate import PROCESS_BYTES, MemoryEstimate, estimate_memory, gathered_weight_bytes
from apprentice.train.memory.model_size import count_quantized
from apprentice.train.optimizer import can_be_sharded

GIB = 2**30
CLEARLY_LESS = 0.9  # of the size that was too much, so that a suggested change really helps


def free_memory() -> float:
    """Bytes of host memory still available: the kernel's MemAvailable, or less where a container's limit leaves less."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = float(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (float((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, ValueError, KeyError):  # no limit ("max"), or no cgroup v2
        return free
    return min(free, limit - used + float(cached))


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process so far: of tensors on the GPU, or resident memory on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def total_memory(device: torch.device) -> float:
    """Bytes of memory of the GPU `device`."""
    return float(torch.cuda.get_device_properties(device).total_memory)


def estimate_peak_memory(
    recipe: Recipe, parameters: int, trained: int, dtype: torch.dtype, *, workers: int, micro: int, length: int
) -> MemoryEstimate:
    """Peak memory of the first of `workers`, with micro-batches of `micro` rows of `length` tokens.

    The other arguments are those of `estimate_memory`.
    """
    saved = estimate_activations(recipe, dtype, micro, length)
    quantized = count_quantized(recipe)
    return add_to_activations(saved, recipe, parameters, trained, dtype, workers=workers, quantized=quantized)


def add_to_activations(
    saved: float | None, recipe: Recipe, parameters: int, trained: int, dtype: torch.dtype, *, workers: int, quantized: int
) -> MemoryEstimate:
    """Peak memory of the first of `workers`, as `estimate_peak_memory`, with activations of `saved` bytes (None: not known)."""
    estimate = estimate_memory(recipe, parameters, trained, dtype, workers, quantized=quantized)
    estimate = replace(estimate, weights=estimate.weights + gathered_weight_bytes(recipe, parameters, dtype), activations=saved)
    if recipe.training.resources.gpus:
        return estimate  # process and checkpoint take no GPU memory
    share = 12.0 * trained / workers  # of a checkpoint's bytes: float32 weight and two moments
    return replace(estimate, process=PROCESS_BYTES, checkpoint=share + min(share, WINDOW_BYTES))


def estimate_of_finished_run(recipe: Recipe, length: int, sizes: Mapping[str, int]) -> MemoryEstimate:
    """`estimate_peak_memory` for workers that ran: `sizes` has the keys workers, micro (rows) and trained (parameters)."""
    dtype = resolve_dtype(recipe.model.dtype, "cuda" if recipe.training.resources.gpus else "cpu")
    numbers = count_parameters(local_folder(recipe.model.base))
    return estimate_peak_memory(
        recipe, numbers, sizes["trained"], dtype, workers=sizes["workers"], micro=sizes["micro"], length=length
    )


class Change(NamedTuple):
    """A change of a recipe that takes less memory: its text (`key: value` and the cost), and the recipe and sizes with it."""

    text: str
    recipe: Recipe
    micro: int
    length: int


def list_smaller_recipes(recipe: Recipe, micro: int, length: int, workers: int) -> list[Change]:
    """Changes of the recipe that take less memory, the least intrusive first."""
    training, deepspeed = recipe.training, recipe.training.deepspeed
    rows = training.global_batch // data_parallel_size(workers, training.sequence_parallel)
    fewer = max((size for size in range(1, micro) if rows % size == 0), default=0)
    shorter = recipe.data.packing.length // 2
    highest = 2 if recipe.tuning.keeps_weights_whole else 3

    def with_training(**values: Any) -> Recipe:
        return recipe.model_copy(update={"training": training.model_copy(update=values)})

    def with_deepspeed(**values: Any) -> Recipe:
        return with_training(deepspeed=deepspeed.model_copy(update=values))

    candidates: list[tuple[bool, str, Recipe, int, int]] = [
        (fewer > 0, f"training.micro_batch: {fewer} (the same steps, more passes)", recipe, fewer, length),
        (
            not training.activation_checkpointing,
            "training.activation_checkpointing: true (a third more time)",
            with_training(activation_checkpointing=True),
            micro,
            length,
        ),
        (
            workers > 1 and deepspeed.stage < highest and can_be_sharded(training.optimizer),
            f"training.deepspeed.stage: {deepspeed.stage + 1}",
            with_deepspeed(stage=deepspeed.stage + 1),
            micro,
            length,
        ),
        (
            training.resources.gpus > 0 and deepspeed.stage > 0 and deepspeed.offload == "none",
            "training.deepspeed.offload: cpu (slower steps)",
            with_deepspeed(offload="cpu"),
            micro,
            length,
        ),
        (
            recipe.tuning.method == "full",
            "tuning.method: lora",
            recipe.model_copy(update={"tuning": recipe.tuning.model_copy(update={"method": "lora"})}),
            micro,
            length,
        ),
        (True, f"data.packing.length: {shorter}", recipe, micro, length // 2),
    ]
    return [
        Change(text, smaller, rows_at_once, tokens)
        for is_possible, text, smaller, rows_at_once, tokens in candidates
        if is_possible
    ]


def choose_changes(changes: Sequence[Change], total: Callable[[Change], float], limit: float) -> list[Change]:
    """The first two of `changes` whose `total` bytes are within `limit`; where fewer are, those that come nearest besides."""
    sizes = [total(change) for change in changes]
    order = sorted(range(len(changes)), key=lambda place: (sizes[place] > limit, sizes[place] if sizes[place] > limit else place))
    return [changes[place] for place in order[:2]]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is PyTorch's for a failed allocation, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def describe_memory_in_use(device: torch.device) -> str:
    """Memory in use, as text in brackets for the end of a sentence."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f" ({(total - free) / GIB:.1f} of {total / GIB:.1f} GiB of the GPU were in use)"
    return f" (the process had used up to {peak_memory(device) / GIB:.1f} GiB)"


def out_of_memory_error(state: MemoryEstimate, micro: int, length: int, used: str, changes: Sequence[Change]) -> TrainingError:
    """The error of a worker that ran out of memory with `micro` rows of `length` tokens.

    `used` is the text of `describe_memory_in_use`.
    """
    rows = f"{micro} row{'s' if micro != 1 else ''} of {length} tokens"
    rest = "an unknown rest" if state.activations is None else f"{state.activations / GIB:.2f}"
    return TrainingError(
        f"a worker ran out of memory with {rows} at once{used}: weights take about {state.weights / GIB:.2f} GiB, gradients"
        f" {state.gradients / GIB:.2f}, the optimizer {state.optimizer / GIB:.2f} and activations {rest}."
        f" The smallest changes that help: {', or '.join(change.text for change in changes)}."
    )


@dataclass
class OutOfMemoryAdvisor:
    """Explains running out of memory on one worker.

    `parameters` is the model's size. `trained` is set once the engine knows it; before, it is all of them in full tuning, else 0.
    """

    recipe: Recipe
    parameters: int
    dtype: torch.dtype
    micro: int
    length: int
    workers: int
    device: torch.device
    trained: int = 0

    def __post_init__(self) -> None:
        self.trained = self.parameters if self.recipe.tuning.method == "full" else 0

    @contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Raises `TrainingError` with changes that help, instead of PyTorch's error, if memory runs out inside."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            estimate = self._estimate(Change("", self.recipe, self.micro, self.length))
            changes = list_smaller_recipes(self.recipe, self.micro, self.length, self.workers)
            helpful = choose_changes(changes, lambda change: self._estimate(change).total, self._limit(estimate))
            raise out_of_memory_error(estimate, self.micro, self.length, describe_memory_in_use(self.device), helpful) from error

    def _estimate(self, change: Change) -> MemoryEstimate:
        trained = self.trained if change.recipe.tuning.method == self.recipe.tuning.method else 0
        saved = estimate_activations(change.recipe, self.dtype, change.micro, change.length)
        sizes = (self.parameters, trained, self.dtype, self.workers)
        return replace(estimate_memory(change.recipe, *sizes, quantized=count_quantized(change.recipe)), activations=saved)

    def _limit(self, estimate: MemoryEstimate) -> float:
        """Bytes that a suggested change may take: 90% of the GPU, or of the estimate that was too much if that is less."""
        capacity = torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else math.inf
        return CLEARLY_LESS * min(estimate.total, capacity)
