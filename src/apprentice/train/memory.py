"""What a worker holds in memory, as far as arithmetic knows it, and what to change when it was not enough.

Weights, gradients and the optimizer's state are counted; activations depend on the rows at once, and are what is left. Knows
nothing of Ray or DeepSpeed.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from apprentice.errors import TrainingError
from apprentice.recipe import Recipe

GIB = 2**30


@dataclass(frozen=True)
class Held:
    """Bytes that one worker holds beside activations."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def held(recipe: Recipe, parameters: int, trained: int, dtype: torch.dtype, workers: int) -> Held:
    """For a model of `parameters` numbers in `dtype`, of which `trained` are trained, shared out as the recipe's stage says."""
    training = recipe.training
    stage, offload = training.deepspeed.stage, training.deepspeed.offload != "none"
    narrow = dtype != torch.float32 and training.optimizer.name != "adafactor"  # Adafactor keeps the weights themselves wide
    weights = parameters * (2 if narrow else 4) / (workers if stage == 3 else 1)
    gradients = trained * 4 / (workers if stage >= 2 else 1)
    # Adam's two moments (Adafactor keeps rows and columns, next to nothing), and float32 weights beside narrow ones
    optimizer: float = trained * ((0 if training.optimizer.name == "adafactor" else 8) + (4 if narrow else 0))
    optimizer /= workers if stage >= 1 else 1
    return Held(weights, gradients, 0.0 if offload else optimizer)


def smaller(recipe: Recipe, micro: int, workers: int) -> list[str]:
    """Changes of the recipe that take less memory, the smallest first: each as `key: value`, with what it costs."""
    training, deepspeed = recipe.training, recipe.training.deepspeed
    rows = training.global_batch // workers
    fewer = max((size for size in range(1, micro) if rows % size == 0), default=0)
    found = [
        (fewer > 0, f"training.micro_batch: {fewer} (the same steps, more passes)"),
        (not training.activation_checkpointing, "training.activation_checkpointing: true (a third more time)"),
        (
            workers > 1 and deepspeed.stage < 3 and training.optimizer.name != "adafactor",
            f"training.deepspeed.stage: {deepspeed.stage + 1}",
        ),
        (
            training.resources.gpus > 0 and deepspeed.stage > 0 and deepspeed.offload == "none",
            "training.deepspeed.offload: cpu (slower steps)",
        ),
        (recipe.tuning.method == "full", "tuning.method: lora"),
        (True, f"data.packing.length: {recipe.data.packing.length // 2}"),
    ]
    return [change for fits, change in found if fits]


def ran_out(error: BaseException) -> bool:
    """True for what PyTorch raises when an allocation fails, on a GPU or not."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def in_use(device: torch.device) -> str:
    """What this process has used so far, in brackets behind a sentence."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f" ({(total - free) / GIB:.1f} of {total / GIB:.1f} GiB of the GPU were in use)"
    return f" (the process had used up to {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB:.1f} GiB)"


def out_of_memory(recipe: Recipe, state: Held, micro: int, length: int, workers: int, used: str) -> TrainingError:
    """The sentence for a worker that ran out of memory with `micro` rows of `length` tokens at once; `used` says of what."""
    first, *rest = smaller(recipe, micro, workers)
    then = f", or {rest[0]}" if rest else ""
    rows = f"{micro} row{'s' if micro != 1 else ''} of {length} tokens"
    return TrainingError(
        f"a worker ran out of memory with {rows} at once{used}: weights take about {state.weights / GIB:.2f} GiB, gradients"
        f" {state.gradients / GIB:.2f} and the optimizer {state.optimizer / GIB:.2f}, activations the rest."
        f" The smallest changes that help: {first}{then}."
    )


@dataclass
class Watch:
    """What one worker's sentence needs to know; `trained` numbers are all of them in full tuning, until the engine knows it."""

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
    def explained(self) -> Iterator[None]:
        """Raises `TrainingError` instead of PyTorch's own error where memory runs out inside."""
        try:
            yield
        except RuntimeError as error:
            if not ran_out(error):
                raise
            state = held(self.recipe, self.parameters, self.trained, self.dtype, self.workers)
            raise out_of_memory(self.recipe, state, self.micro, self.length, self.workers, in_use(self.device)) from error
