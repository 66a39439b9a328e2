"""Experts of mixture-of-experts models, whose weights transformers keeps for all experts of a layer in one parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # names of the number of experts in configs


def expert_parameters(model: nn.Module) -> list[str]:
    """Last two parts of the names of parameters (experts, …, …), as peft's `target_parameters` takes them."""
    names = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Conv1d):
            shapes = {name: _shape(parameter) for name, parameter in module.named_parameters(recurse=False)}
            names += [f"{path.rpartition('.')[2]}.{name}" for name, shape in shapes.items() if len(shape) == 3]
    return sorted(set(names))


def count_experts(config: Any) -> int:
    """Number of experts in a layer of a model of `config`; 0 without any."""
    return next((int(value) for key in _COUNTS if (value := getattr(config, key, None))), 0)


def active_share(name: str, parameter: nn.Parameter, config: Any) -> float:
    """Share of the parameter `name` that a token meets: of experts, and of LoRA's matrices beside them, those it is sent to."""
    used = getattr(config, "num_experts_per_tok", None)
    is_of_experts = len(_shape(parameter)) == 3 or "experts" in name.split(".")
    count = count_experts(config)
    return min(1.0, used / count) if used and count and is_of_experts else 1.0


def modules_used_as_one(model: nn.Module) -> list[nn.Module]:
    """Modules whose own and inner parameters are used at a call of them, whether or not the inner modules are called.

    They are peft's wrappers of a parameter, whose LoRA matrices belong to modules that are never called, and layers of experts that
    are modules, of which only those are called that tokens are sent to.
    """
    wrappers = [module for module in model.modules() if hasattr(module, "parameter_name") and hasattr(module, "lora_A")]
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and name.endswith(".experts")]
    return wrappers + [model.get_submodule(name.rpartition(".")[0]) for name in lists]


def _shape(parameter: Any) -> torch.Size:
    """Shape of the whole parameter, also where ZeRO-3 has split it up."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
