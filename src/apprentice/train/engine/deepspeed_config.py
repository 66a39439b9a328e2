"""DeepSpeed's configuration, a plain dict made from the recipe's training section by pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from apprentice.errors import RecipeError
from apprentice.recipe import DeepSpeed, Training, data_parallel_size

# Most tokens in a micro-batch for `micro_batch: auto`. On a CPU more costs memory and brings no speed.
CPU_MICRO_TOKENS = 2048
GPU_MICRO_TOKENS = 8192
# Keys of DeepSpeed that a recipe must not set in `extra`, and the key that decides them.
_OURS = {
    "optimizer": "training.optimizer",
    "scheduler": "training.optimizer.schedule",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "steps_per_print": "apprentice, which shows every step",
    "activation_checkpointing": "training.activation_checkpointing",
}
# Keys of DeepSpeed that do not go together with what is done here, and why.
_UNFIT = {
    "zero_optimization.mics_shard_size": "divides the state among some of the workers, and a checkpoint holds an equal part of each"
}
# Keys that `extra` may only repeat with the same value, and the key that decides them.
_DECIDED_BY = {
    "train_batch_size": "training.global_batch",
    "train_micro_batch_size_per_gpu": "training.micro_batch",
    "gradient_accumulation_steps": "training.global_batch with micro_batch",
    "gradient_clipping": "training.optimizer.clip",
    "bf16.enabled": "model.dtype",
    "fp16.enabled": "model.dtype",
    "zero_optimization.stage": "training.deepspeed.stage",
    "zero_optimization.offload_optimizer.device": "training.deepspeed.offload",
    "zero_optimization.offload_param.device": "training.deepspeed.offload_parameters",
}
LARGEST_BUCKET = 50_000_000  # elements reduced at once; DeepSpeed keeps a buffer of this size


def rows_per_worker(training: Training, workers: int) -> int:
    """Packed rows of one optimizer step for each worker, or for each group of workers that share rows.

    Raises `RecipeError` if `global_batch` cannot be divided among them.
    """
    readers = data_parallel_size(workers, training.sequence_parallel)
    if training.global_batch % readers:
        whose = "workers" if readers == workers else f"groups of {training.sequence_parallel} workers that share rows"
        raise RecipeError(f"global_batch {training.global_batch} cannot be divided among {readers} {whose}; choose a multiple.")
    return training.global_batch // readers


def choose_micro_batch(training: Training, *, workers: int, length: int, on_gpu: bool) -> int:
    """Number of packed rows (of `length` tokens) in a micro-batch.

    Raises `RecipeError` if the recipe's number does not divide a worker's rows.
    """
    rows = rows_per_worker(training, workers)
    if training.micro_batch == "auto":
        length = math.ceil(length / training.sequence_parallel)  # tokens of a row on one worker
        return micro_batch_rows(rows, length, GPU_MICRO_TOKENS if on_gpu else CPU_MICRO_TOKENS)
    if rows % training.micro_batch:
        raise RecipeError(f"micro_batch {training.micro_batch} does not divide the {rows} rows of one worker; choose a divisor.")
    return training.micro_batch


def zero_stage(training: Training, *, is_16_bit: bool) -> int:
    """The ZeRO stage that is used: the recipe's, but at least 1 with 16-bit weights.

    DeepSpeed accumulates bfloat16 gradients in float32 only if it partitions. Stage 1 computes the same as stage 0, in less memory.
    """
    return max(training.deepspeed.stage, 1) if is_16_bit else training.deepspeed.stage


def deepspeed_config(training: Training, *, workers: int, micro: int, dtype: torch.dtype, trainable: int) -> dict[str, Any]:
    """DeepSpeed's configuration for `workers` workers, micro-batches of `micro` rows, and `trainable` trained parameters.

    `dtype` is the number format of the weights. Raises `RecipeError` for a key of `deepspeed.extra` that contradicts the recipe.
    """
    stage = zero_stage(training, is_16_bit=dtype != torch.float32)
    config = {
        "train_batch_size": training.global_batch * training.sequence_parallel,  # as DeepSpeed counts: each worker has rows
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": rows_per_worker(training, workers) // micro,
        "gradient_clipping": training.optimizer.clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": _zero(training.deepspeed, stage, min(max(trainable, 1), LARGEST_BUCKET)),
        "zero_allow_untested_optimizer": True,  # PyTorch's fused AdamW is as fast as DeepSpeed's and needs no compiler
        "zero_force_ds_cpu_optimizer": False,
    }
    return _with_extra(config, training.deepspeed.extra, "")


def _zero(deepspeed: DeepSpeed, stage: int, bucket: int) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "overlap_comm": on_gpu}
    for key, device in (("offload_optimizer", deepspeed.offload), ("offload_param", deepspeed.offload_parameters)):
        if device != "none" and stage > 0:
            zero[key] = {"device": device, "pin_memory": on_gpu}
            if device == "nvme":
                zero[key]["nvme_path"] = deepspeed.nvme_path
    return zero


def _with_extra(config: dict[str, Any], extra: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Merges `extra` into `config`: it may add keys and repeat values. Raises `RecipeError` where it contradicts."""
    merged = dict(config)
    for key, value in extra.items():
        name = f"{path}{key}"
        if name in _OURS:
            raise RecipeError(f"training.deepspeed.extra.{name} is decided by {_OURS[name]}; leave it out.")
        if name in _UNFIT:
            raise RecipeError(f"training.deepspeed.extra.{name} {_UNFIT[name]}; leave it out.")
        if isinstance(value, Mapping) and isinstance(config.get(key, {}), dict):
            merged[key] = _with_extra(config.get(key, {}), value, f"{name}.")
        elif key in config and config[key] != value:
            where = _DECIDED_BY.get(name, "the recipe")
            raise RecipeError(
                f"training.deepspeed.extra.{name} is {value!r}, and {where} makes it {config[key]!r}; leave it out, or change that."
            )
        else:
            merged[key] = value
    return merged


def micro_batch_rows(rows: int, length: int, budget: int) -> int:
    """Rows in a micro-batch for `micro_batch: auto`: the largest divisor of `rows` with at most `budget` tokens; at least 1.

    `rows` are one worker's packed rows of a step, of `length` tokens each.
    """
    return max(size for size in range(1, rows + 1) if rows % size == 0 and (size == 1 or size * length <= budget))
