"""Loads a worker's model, on the worker's device and in its dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from apprentice.inference.cpu_linear import place_model
from apprentice.model_pool.pool import WorkerPool
from apprentice.models.loading import count_parameters, load_model, resolve_dtype
from apprentice.pretrained.architecture import gives_rewards
from apprentice.recipe import Model


def load_worker_model(folder: Path, settings: Model, pool: WorkerPool) -> Any:
    """Loads the model in `folder` as `settings` say, on the device of a worker of `pool`; sets the process's number of threads."""
    torch.set_num_threads(pool.cpus)
    device = "cuda" if pool.gpus else "cpu"
    head = 0 if gives_rewards(folder) else None
    dtype = resolve_dtype(settings.dtype, device)
    return place_model(load_model(folder, dtype, settings.attention, head=head, trust=settings.trust), device)


def weight_bytes(folder: Path, model: Model, *, gpu: bool) -> int:
    """Bytes of one copy of the weights in the dtype of scoring."""
    return count_parameters(folder) * resolve_dtype(model.dtype, "cuda" if gpu else "cpu").itemsize
