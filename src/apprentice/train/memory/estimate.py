"""Memory estimate of a worker: bytes of weights, gradients and optimizer state, by arithmetic alone.

It imports no model code, so that a check whether a recipe fits stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from apprentice.recipe import Recipe
from apprentice.train.engine.deepspeed_config import LARGEST_BUCKET, zero_stage
from apprentice.train.optimizer import moment_bytes, number_formats

# Measured size of a worker's process on a CPU before it loads a model: Python, PyTorch, Ray, DeepSpeed and transformers.
PROCESS_BYTES = 449 * 2**20

# DeepSpeed's defaults: parameters that ZeRO-3 has gathered at a time and fetches ahead; numbers reduced at once at stage 0; numbers
# of an optimizer group and of a weight's buffer that go to `nvme`, and how many such buffers there are of each.
LIVE_PARAMETERS, PREFETCHED_PARAMETERS = 1e9, 5e7
PLAIN_BUCKET = 5e8
DISK_GROUP, DISK_GROUPS, DISK_WEIGHTS, DISK_WEIGHT_BUFFERS = 1e9, 4, 1e8, 5
NCCL_BYTES = 2.0**30  # what its communicators hold on a GPU; an assumption
# A weight in 4 bits (NF4, double quantization; Dettmers et al. 2023, section 3): with a byte of scale for each 64 weights, and 4
# bytes more for 256 of these.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
GRADIENT_BYTES = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of memory that one worker needs: of its GPU if it has one, else of the host."""

    weights: float
    gradients: float
    optimizer: float
    activations: float | None = 0.0  # None where not known
    buffers: float = 0.0  # of ZeRO and NCCL, on a GPU
    process: float = 0.0
    checkpoint: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts; activations that are not known count as 0."""
        state = self.weights + self.gradients + self.optimizer
        return state + (self.activations or 0.0) + self.buffers + self.process + self.checkpoint


def estimate_memory(
    recipe: Recipe, parameters: int, trained: int, dtype: torch.dtype, workers: int, *, quantized: int = 0
) -> MemoryEstimate:
    """Memory of one of `workers` without activations, with weights, gradients and optimizer sharded as the ZeRO stage says.

    The model has `parameters` parameters in `dtype`, of which `trained` are trained and `quantized` are kept in 4 bits.
    """
    training, offload, on_gpu = recipe.training, recipe.training.deepspeed.offload, recipe.training.resources.gpus > 0
    # Whether the optimizer's state is in another memory than the one counted here; from stage 2 on gradients are, too.
    is_offloaded = offload == "nvme" or (offload == "cpu" and on_gpu)
    width, stage = _weight_bytes(recipe, dtype), _stage(recipe, dtype)
    # Weights of stage 3 that wait elsewhere come back as `gathered_weight_bytes`.
    is_fetched = training.deepspeed.offload_parameters != "none" and on_gpu
    weights = 0.0 if is_fetched else ((parameters - quantized) * width + quantized * NF4_BYTES) / (workers if stage == 3 else 1)
    gradients = 0.0 if is_offloaded and on_gpu and stage >= 2 else GRADIENT_BYTES * trained / (workers if stage >= 2 else 1)
    optimizer = 0.0 if is_offloaded else _state_bytes(recipe, dtype) * trained / (workers if stage >= 1 else 1)
    return MemoryEstimate(weights, gradients, optimizer, buffers=_buffer_bytes(recipe, trained, dtype, workers) if on_gpu else 0.0)


def offloaded_bytes(recipe: Recipe, parameters: int, trained: int, dtype: torch.dtype, workers: int) -> float:
    """Bytes of the host's memory that one of `workers` with a GPU offloads to, or moves to a disk through.

    DeepSpeed adds up a step's gradients in one buffer and copies them into another for the update; before stage 3 it also keeps a
    copy of the updated weights there.
    """
    deepspeed, width, shard = recipe.training.deepspeed, _weight_bytes(recipe, dtype), trained / workers
    total = 0.0
    if deepspeed.offload == "cpu":
        copies = GRADIENT_BYTES if _stage(recipe, dtype) == 3 else 2 * width
        total += shard * (4 + moment_bytes(recipe.training.optimizer) + GRADIENT_BYTES + copies)
    elif deepspeed.offload == "nvme":
        total += GRADIENT_BYTES * shard + DISK_GROUPS * 4 * min(shard, DISK_GROUP)
    if deepspeed.offload_parameters == "cpu":
        total += width * parameters / workers
    elif deepspeed.offload_parameters == "nvme":
        total += DISK_WEIGHT_BUFFERS * width * DISK_WEIGHTS
    return total


def gathered_weight_bytes(recipe: Recipe, parameters: int, dtype: torch.dtype) -> float:
    """Bytes of gathered weights at the peak of ZeRO-3, beside each worker's shard; 0 at other stages."""
    if _stage(recipe, dtype) < 3:
        return 0.0
    settings = _zero_settings(recipe)
    live = settings.get("stage3_max_live_parameters", LIVE_PARAMETERS)
    prefetched = settings.get("stage3_prefetch_bucket_size", PREFETCHED_PARAMETERS)
    return float(min(parameters, live) + min(parameters, prefetched)) * _weight_bytes(recipe, dtype)


def _buffer_bytes(recipe: Recipe, trained: int, dtype: torch.dtype, workers: int) -> float:
    """Bytes of a GPU for gradients on their way: ZeRO fills one bucket while it reduces another one in float32; and NCCL's own."""
    nccl = NCCL_BYTES if workers > 1 else 0.0
    if _stage(recipe, dtype) == 0:
        return nccl + (GRADIENT_BYTES * min(trained, PLAIN_BUCKET) if workers > 1 else 0.0)
    bucket = min(trained, _zero_settings(recipe).get("reduce_bucket_size", LARGEST_BUCKET))
    return nccl + bucket * (2 * _weight_bytes(recipe, dtype) + GRADIENT_BYTES)


def _zero_settings(recipe: Recipe) -> Mapping[str, float]:
    settings: Mapping[str, float] = recipe.training.deepspeed.extra.get("zero_optimization", {})
    return settings


def _weight_bytes(recipe: Recipe, dtype: torch.dtype) -> int:
    return number_formats(recipe.training.optimizer, dtype).weights.itemsize


def _stage(recipe: Recipe, dtype: torch.dtype) -> int:
    return zero_stage(recipe.training, is_16_bit=_weight_bytes(recipe, dtype) == 2)


def _state_bytes(recipe: Recipe, dtype: torch.dtype) -> float:
    """Bytes of the optimizer's state for a trained number: its moments, and the float32 copy of a 16-bit weight."""
    return moment_bytes(recipe.training.optimizer) + (4 if _weight_bytes(recipe, dtype) == 2 else 0)
