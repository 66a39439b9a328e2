"""The recipe's training section as DeepSpeed's configuration: a pure function, a plain dict.

Knows nothing of models beyond the number format and size of what is trained.
"""

from __future__ import annotations

from typing import Any

import torch

from apprentice.errors import RecipeError
from apprentice.recipe import Training
from apprentice.train.batch import micro_batch_rows

# Tokens of a micro-batch that `auto` stays within. More brings no speed on a CPU, only memory.
CPU_MICRO_TOKENS = 2048
GPU_MICRO_TOKENS = 8192
_LARGEST_BUCKET = 50_000_000  # numbers reduced in one go; DeepSpeed keeps a buffer of this size


def rows_per_worker(training: Training, workers: int) -> int:
    """Packed rows of one step that each of `workers` gets. Raises `RecipeError` if they do not divide the step."""
    if training.global_batch % workers:
        raise RecipeError(f"global_batch {training.global_batch} cannot be divided among {workers} workers; choose a multiple.")
    return training.global_batch // workers


def micro_batch(training: Training, *, workers: int, length: int, on_gpu: bool) -> int:
    """Packed rows of `length` tokens that one forward pass takes."""
    rows = rows_per_worker(training, workers)
    if training.micro_batch == "auto":
        return micro_batch_rows(rows, length, GPU_MICRO_TOKENS if on_gpu else CPU_MICRO_TOKENS)
    if rows % training.micro_batch:
        raise RecipeError(f"micro_batch {training.micro_batch} does not divide the {rows} rows of one worker; choose a divisor.")
    return training.micro_batch


def deepspeed_config(training: Training, *, workers: int, micro: int, dtype: torch.dtype, trainable: int) -> dict[str, Any]:
    """DeepSpeed's configuration for `workers` that each pass `micro` rows at once and train `trainable` numbers together."""
    # DeepSpeed adds up bfloat16 gradients in float32 only if it partitions: stage 1 gives stage 0's numbers, in less memory.
    stage = max(training.deepspeed.stage, 1) if dtype == torch.bfloat16 else training.deepspeed.stage
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": min(max(trainable, 1), _LARGEST_BUCKET),
        "overlap_comm": torch.cuda.is_available(),
    }
    if training.deepspeed.offload != "none" and stage > 0:
        zero["offload_optimizer"] = {"device": training.deepspeed.offload, "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": training.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": rows_per_worker(training, workers) // micro,
        "gradient_clipping": training.optimizer.clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # PyTorch's AdamW, fused, is as fast as theirs and needs no compiler
        "zero_force_ds_cpu_optimizer": False,
    }
