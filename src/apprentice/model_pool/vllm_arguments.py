"""Arguments of vLLM's engine for a model: its dtype, limits, KV memory, and the GPUs that it is split over.

The names are those of vLLM's `EngineArgs`, read in vLLM 0.29. They are the same for the endpoint's engine and for workers that
answer a list of prompts. vLLM itself is not imported.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch

from apprentice.errors import ModelError, ResourcesError
from apprentice.model_pool.host_memory import GIB
from apprentice.models.loading import resolve_dtype
from apprentice.pretrained.architecture import kv_values_per_token, model_config

BLOCK_TOKENS = 128  # in one of vLLM's KV blocks on a CPU; a GPU's blocks are smaller
CONTEXT_BYTES = 1 << 30  # of CUDA and NCCL in each of vLLM's processes, an assumption
GPU_SHARE = 0.92  # of a GPU's memory that vLLM takes for weights, activations and KV cache together; its own default


def vllm_arguments(
    folder: Path,
    *,
    device: Literal["cpu", "cuda"],
    dtype: str,
    max_running: int,
    context: int,
    kv_bytes: int | None,
    trust: bool,
    tensor_parallel: int = 1,
    engines: int = 1,
    free_share: float = 1.0,
) -> dict[str, Any]:
    """Arguments for the model in `folder`, which is split over `tensor_parallel` GPUs, or processes on a CPU.

    `kv_bytes` is the memory for keys and values of the whole model; None takes, on GPUs, what the weights leave free, shared by
    `engines` engines in equal parts, and on CPUs `max_running` contexts of `context` tokens. `free_share` is the part of a GPU's
    memory that may be taken at most, as `find_free_share` gives it.
    """
    kind = resolve_dtype(dtype, device)
    arguments: dict[str, Any] = {
        "model": str(folder),
        "dtype": str(kind).removeprefix("torch."),
        "max_model_len": context,
        "max_num_seqs": max_running,
        "kv_cache_memory_bytes": kv_bytes and kv_bytes // tensor_parallel,  # vLLM counts it for each GPU
        "load_format": "auto" if trust else "safetensors",
        "trust_remote_code": trust,
        "generation_config": "vllm",  # sampling parameters come with each request, not from the model's folder
    }
    if kv_bytes is None and device == "cpu":
        arguments["kv_cache_memory_bytes"] = _kv_bytes(
            folder, kind.itemsize, max_running * context_in_blocks(context), tensor_parallel
        )
    share = min(GPU_SHARE / engines, free_share)
    if device == "cuda" and share < GPU_SHARE:
        # With `kv_bytes`, too: an engine does not start where less than this share of the GPU is free.
        arguments["gpu_memory_utilization"] = round(share, 3)
    if tensor_parallel > 1:
        # Named, because vLLM would take Ray's workers in a placement group, and they want a bundle for each GPU. The GPUs of one
        # node are one bundle here: processes beside each other need no Ray between them.
        arguments |= {"tensor_parallel_size": tensor_parallel, "distributed_executor_backend": "mp"}
    return arguments


def find_free_share(others: int = 0) -> float:
    """The part of the memory of this process's GPUs that an engine may take: what is free now, but for `others` bytes.

    Of the GPU with the least. Raises `ResourcesError` where nothing is left.
    """
    sizes = [torch.cuda.mem_get_info(number) for number in range(torch.cuda.device_count())]
    free, total = min(sizes, key=lambda size: size[0] / size[1])
    share = (free - others - CONTEXT_BYTES) / total
    if share <= 0:
        raise ResourcesError(
            f"{free / GIB:.1f} of a GPU's {total / GIB:.1f} GiB are free, and what runs there beside vLLM needs"
            f" {(others + CONTEXT_BYTES) / GIB:.1f}; end what else holds its memory, or use serving.engine transformers."
        )
    return share


def context_in_blocks(context: int) -> int:
    """`context` tokens, rounded up to whole KV blocks."""
    return -(-context // BLOCK_TOKENS) * BLOCK_TOKENS


def _kv_bytes(folder: Path, itemsize: int, tokens: int, tensor_parallel: int) -> int | None:
    """Bytes of the KV cache of `tokens` tokens in each of `tensor_parallel` processes; None where the config does not tell.

    A process has its part of the key and value heads, and at least one.
    """
    config = model_config(folder)
    if (numbers := kv_values_per_token(config)) is None:
        return None
    inner = config.get("text_config") or config
    heads = inner.get("num_key_value_heads") or inner.get("num_attention_heads") or inner.get("n_head") or 1
    return int(numbers * itemsize * tokens) // min(tensor_parallel, heads)


def prepare_environment(threads: int | None = None) -> None:
    """Sets the environment that vLLM reads when it is imported; `threads` are the CPU threads of each of its processes, on CPUs.

    No usage statistics are sent, and a log has warnings only. `threads` are not bound to cores if that leaves CPUs to other
    processes.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if threads is not None and threads < len(os.sched_getaffinity(0)):
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["OMP_NUM_THREADS"] = str(threads)


def start_failure(folder: Path, error: Exception) -> ModelError:
    """The error for a vLLM that does not start with the model in `folder`: most often the model or the GPU is not for it."""
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return ModelError(
        f"vLLM does not start with {folder}: {reason}; its log says why. End what else holds memory of its GPUs (it takes nearly"
        " all), or use serving.engine transformers."
    )
