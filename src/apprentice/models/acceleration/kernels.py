"""Choice of the kernels of a model's layers in training: Liger's fused norm, rotary positions and MLP, or those of transformers.

`auto` takes Liger's on GPUs, where the package is installed and has kernels for the model. Its losses are never taken: ours weigh
targets one by one, and split them into chunks (`apprentice.train.losses.chunked_cross_entropy`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from apprentice.errors import ModelError
from apprentice.models import compat

Kernels = Literal["auto", "liger", "none"]
# Architectures whose replacement was read (liger-kernel 0.8.5). Of others it replaces experts, or what tuning methods wrap.
_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"})
_ACTIVATIONS = ("hidden_act", "hidden_activation")  # names of an MLP's activation in configs


def choose_liger(word: Kernels, device: torch.device, config: Any) -> bool:
    """Whether the recipe's `word` means Liger's kernels for a model of `config` that is trained on `device`.

    Raises `ModelError` if `liger` is asked for where it cannot run.
    """
    if word == "none":
        return False
    types = compat.liger_types() if device.type == "cuda" else frozenset()
    has_kernels = config.model_type in types & _TYPES and _has_usual_activation(config)
    if word == "auto" or has_kernels:
        return has_kernels
    if device.type != "cuda":
        raise ModelError("training.kernels liger needs a GPU, and training runs on CPUs; use auto.")
    if not types:
        raise ModelError(
            "training.kernels liger needs the package liger-kernel, which is not installed here; pip install 'apprentice[liger]',"
            " or use auto."
        )
    if config.model_type in types & _TYPES:
        raise ModelError(f"training.kernels liger has another activation than this {config.model_type} model; use auto.")
    raise ModelError(f"training.kernels liger has no kernels that are known to fit {config.model_type}; use auto.")


def use_kernels(model: Any, word: Kernels, device: torch.device) -> bool:
    """Gives the layers of `model` the kernels that the recipe's `word` means, and says whether they are Liger's.

    Tuning methods may be wrapped around `model`, and its weights may be split up. Rotary positions are replaced for all models of
    this architecture in the process, so it is for the processes that train and no others.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    is_liger = choose_liger(word, device, base.config)
    if is_liger:
        compat.use_liger(base)
    return is_liger


def has_liger(model: torch.nn.Module) -> bool:
    """Whether some layer of `model` computes with a kernel of Liger's."""
    forwards = (getattr(module.forward, "__func__", module.forward) for module in model.modules())
    return any(forward.__module__.partition(".")[0] == "liger_kernel" for forward in forwards)


def _has_usual_activation(config: Any) -> bool:
    """Whether the MLP's activation is that of the architecture: Liger computes that one, whatever a config says."""
    usual = type(config)()
    return all(getattr(config, name) == getattr(usual, name) for name in _ACTIVATIONS if hasattr(usual, name))
