"""Workers of a pool: how many there are for a model, and how each loads it, on its device and in its dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from apprentice.inference.cpu_linear import place_model
from apprentice.model_pool.device import reserved_device
from apprentice.model_pool.engine_choice import EngineChoice
from apprentice.model_pool.pool import FreeResources, WorkerPool, size_pool
from apprentice.model_pool.vllm_model import VllmModel
from apprentice.models.loading import count_parameters, load_model, resolve_dtype
from apprentice.pretrained.architecture import gives_rewards
from apprentice.recipe import Model, Serving


def plan_pool(
    folder: Path, dtype: str, choice: EngineChoice, serving: Serving, resources: FreeResources, batches: int
) -> tuple[WorkerPool, str]:
    """Pool of workers for the model in `folder` with the engine of `choice`, and the words "loading on …" that announce it.

    Raises `ResourcesError` where no worker fits.
    """
    weights = weight_bytes(folder, dtype, gpu=resources.gpus > 0)
    split = serving.tensor_parallel if choice.name == "vllm" else 1
    pool = size_pool(resources, weights, batches, engine=choice.name, tensor_parallel=split)
    words = f"loading on {pool.workers} worker{'s' if pool.workers > 1 else ''}"
    return pool, f"{words}, {choice}" if pool.gpus or choice.name == "vllm" else words


def load_worker_model(folder: Path, settings: Model, pool: WorkerPool, context: int) -> Any:
    """Loads the model in `folder` as `settings` say, on the device of a worker of `pool`; sets the process's number of threads.

    A transformers model, or a `VllmModel` for prompts and replies of `context` tokens together, as the pool's engine says.
    """
    torch.set_num_threads(pool.cpus)
    device = reserved_device(pool.gpus)
    if pool.engine == "vllm":
        return VllmModel(
            folder,
            device=device,
            dtype=settings.dtype,
            context=context,
            threads=pool.cpus,
            tensor_parallel=pool.tensor_parallel,
            trust=settings.trust,
        )
    head = 0 if gives_rewards(folder) else None
    dtype = resolve_dtype(settings.dtype, device)
    return place_model(load_model(folder, dtype, settings.attention, head=head, trust=settings.trust), device)


def weight_bytes(folder: Path, dtype: str, *, gpu: bool) -> int:
    """Bytes of one copy of the weights of the model in `folder` in `dtype`, a word of `model.dtype`."""
    return count_parameters(folder) * resolve_dtype(dtype, "cuda" if gpu else "cpu").itemsize


def gpu_bytes() -> int | None:
    """Memory of this machine's largest GPU in bytes; None without a GPU, or where CUDA does not start."""
    try:
        gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    except RuntimeError:
        return None
    return max((gpu.total_memory for gpu in gpus), default=None)
