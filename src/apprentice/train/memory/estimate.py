"""Memory estimate of a worker: bytes of weights, gradients and optimizer state, by arithmetic alone.

It imports no model code, so that a check whether a recipe fits stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apprentice.recipe import Recipe
from apprentice.train.engine.deepspeed_config import zero_stage
from apprentice.train.optimizer import moment_bytes, number_formats

# Measured size of a worker's process on a CPU before it loads a model: Python, PyTorch, Ray, DeepSpeed and transformers.
PROCESS_BYTES = 449 * 2**20

# DeepSpeed's defaults for ZeRO-3, in parameters: as many are gathered at a time, and so many more are fetched ahead.
LIVE_PARAMETERS, PREFETCHED_PARAMETERS = 1e9, 5e7


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of memory that one worker needs: of its GPU if it has one, else of the host."""

    weights: float
    gradients: float
    optimizer: float
    activations: float | None = 0.0  # None where not known
    process: float = 0.0
    checkpoint: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts; activations that are not known count as 0."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0.0) + self.process + self.checkpoint


def estimate_memory(recipe: Recipe, parameters: int, trained: int, dtype: torch.dtype, workers: int) -> MemoryEstimate:
    """Memory of one of `workers` without activations, with weights, gradients and optimizer sharded as the ZeRO stage says.

    The model has `parameters` parameters in `dtype`, of which `trained` are trained.
    """
    training = recipe.training
    offload = training.deepspeed.offload
    # Whether the optimizer's state is in another memory than the one counted here.
    is_offloaded = offload == "nvme" or (offload == "cpu" and training.resources.gpus > 0)
    is_16_bit = number_formats(training.optimizer, dtype).weights != torch.float32
    stage = zero_stage(training, is_16_bit=is_16_bit)
    # Weights of stage 3 that wait elsewhere come back as `gathered_weight_bytes`.
    is_fetched = training.deepspeed.offload_parameters != "none" and training.resources.gpus > 0
    weights = 0.0 if is_fetched else parameters * (2 if is_16_bit else 4) / (workers if stage == 3 else 1)
    gradients = trained * 4 / (workers if stage >= 2 else 1)
    optimizer: float = trained * (moment_bytes(training.optimizer) + (4 if is_16_bit else 0))  # float32 copies of 16-bit weights
    optimizer /= workers if stage >= 1 else 1
    return MemoryEstimate(weights, gradients, 0.0 if is_offloaded else optimizer)


def gathered_weight_bytes(recipe: Recipe, parameters: int, dtype: torch.dtype) -> float:
    """Bytes of gathered weights at the peak of ZeRO-3, beside each worker's shard; 0 at other stages."""
    training = recipe.training
    is_16_bit = number_formats(training.optimizer, dtype).weights != torch.float32
    if zero_stage(training, is_16_bit=is_16_bit) < 3:
        return 0.0
    settings = training.deepspeed.extra.get("zero_optimization", {})
    live = settings.get("stage3_max_live_parameters", LIVE_PARAMETERS)
    prefetched = settings.get("stage3_prefetch_bucket_size", PREFETCHED_PARAMETERS)
    return float(min(parameters, live) + min(parameters, prefetched)) * (2 if is_16_bit else 4)
