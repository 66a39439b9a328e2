"""What a worker holds in memory, as far as it can be known beforehand: weights, gradients and the optimizer's state.

Arithmetic alone, so that whoever only asks whether a recipe fits loads no model code. Knows nothing of Ray or DeepSpeed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apprentice.recipe import Recipe
from apprentice.train.engine.deepspeed_config import engine_stage

# Of a worker's process on a CPU before it has a model, measured: Python, PyTorch, Ray, DeepSpeed and transformers.
PROCESS_BYTES = 449 * 2**20

# DeepSpeed's own settings of ZeRO 3, in numbers: as many are whole at a time, and so many more are fetched ahead.
LIVE, FETCHED = 1e9, 5e7


@dataclass(frozen=True)
class Held:
    """Bytes that one worker holds: on a GPU of the GPU's memory."""

    weights: float
    gradients: float
    optimizer: float
    activations: float | None = 0.0  # None where nobody knows
    process: float = 0.0
    checkpoint: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + (self.activations or 0.0) + self.process + self.checkpoint


def held(recipe: Recipe, parameters: int, trained: int, dtype: torch.dtype, workers: int) -> Held:
    """Beside activations: a model of `parameters` numbers in `dtype`, of which `trained` are trained, shared as the stage says."""
    training = recipe.training
    offload = training.deepspeed.offload
    away = offload == "nvme" or (offload == "cpu" and training.resources.gpus > 0)  # out of the memory that is meant
    narrow = dtype != torch.float32 and training.optimizer.name != "adafactor"  # Adafactor keeps the weights themselves wide
    stage = engine_stage(training, narrow=narrow)
    weights = parameters * (2 if narrow else 4) / (workers if stage == 3 else 1)
    gradients = trained * 4 / (workers if stage >= 2 else 1)
    # Adam's two moments (Adafactor keeps rows and columns, next to nothing), and float32 weights beside narrow ones
    optimizer: float = trained * ((0 if training.optimizer.name == "adafactor" else 8) + (4 if narrow else 0))
    optimizer /= workers if stage >= 1 else 1
    return Held(weights, gradients, 0.0 if away else optimizer)


def gathered(recipe: Recipe, parameters: int, dtype: torch.dtype) -> float:
    """Bytes of the weights that ZeRO 3 has whole at its peak, beside each worker's share; none at other stages."""
    training = recipe.training
    narrow = dtype != torch.float32 and training.optimizer.name != "adafactor"
    if engine_stage(training, narrow=narrow) < 3:
        return 0.0
    said = training.deepspeed.extra.get("zero_optimization", {})
    live, fetched = said.get("stage3_max_live_parameters", LIVE), said.get("stage3_prefetch_bucket_size", FETCHED)
    return float(min(parameters, live) + min(parameters, fetched)) * (2 if narrow else 4)
