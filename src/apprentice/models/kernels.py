"""Choice of the kernels of a model's layers in training: Liger's fused norm, rotary positions and MLP, or those of transformers.

`auto` takes Liger's on GPUs, where the package is installed and knows the architecture. Its losses are never taken: ours are told
apart by target and split into chunks (`apprentice.train.losses.chunked_cross_entropy`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from apprentice.errors import ModelError
from apprentice.models import compat

Kernels = Literal["auto", "liger", "none"]


def choose_liger(word: Kernels, device: torch.device, model_type: str) -> bool:
    """Whether the recipe's `word` means Liger's kernels for packed rows of a `model_type` on `device`.

    Raises `ModelError` if `liger` is asked for where it cannot run.
    """
    if word == "none":
        return False
    types = compat.liger_types() if device.type == "cuda" else frozenset()
    if word == "auto" or model_type in types:
        return model_type in types
    if device.type != "cuda":
        raise ModelError("training.kernels liger needs a GPU, and training runs on CPUs; use auto.")
    if not types:
        raise ModelError("training.kernels liger needs the package liger-kernel; install apprentice[liger], or use auto.")
    raise ModelError(f"training.kernels liger: the installed package does not know {model_type}; use auto.")


def use_kernels(model: Any, word: Kernels, device: torch.device) -> bool:
    """Gives the layers of `model` the kernels that the recipe's `word` means, and says whether they are Liger's.

    Tuning methods may be wrapped around `model`. Rotary positions are replaced for all models of this architecture in the process,
    so it is for the processes that train and no others.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    is_liger = choose_liger(word, device, str(base.config.model_type))
    if is_liger:
        compat.use_liger(base)
    return is_liger
