"""Bottleneck adapters (Houlsby et al. 2019): a small residual network after each self-attention and each feed-forward part.

    adapter.json                  width, and the names of the modules that have an adapter
    adapter_model.safetensors     weights of the adapters, by parameter name

An adapter starts close to the identity, so that training starts from the base model. It is a submodule of the module whose output
it changes, and cannot be merged into the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apprentice.errors import ModelError

CONFIG, WEIGHTS = "adapter.json", "adapter_model.safetensors"
NAME = "bottleneck"
# Architectures' names of self-attention and of the feed-forward part (in BART, of its last matrix).
_AFTER = ("self_attn", "attn", "attention", "self_attention", "SelfAttention", "mlp", "DenseReluDense", "fc2")
_START = 1e-3  # standard deviation of `up`: close to the identity, but not zero, which would be a saddle point


class Bottleneck(nn.Module):
    """Adapter module: x + up(gelu(down(x))), with weights in `dtype`."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, width, dtype=dtype)
        self.up = nn.Linear(width, hidden, dtype=dtype)
        for layer, deviation in ((self.down, hidden**-0.5), (self.up, _START)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Maps (…, hidden) to (…, hidden)."""
        added: Tensor = self.up(nn.functional.gelu(self.down(inputs)))
        return inputs + added


def add_adapters(model: nn.Module, width: int) -> list[str]:
    """Adds adapters of hidden size `width` to `model`; returns the names of the modules that have one.

    Raises `ModelError` for an architecture in which no module has a known name.
    """
    inner: Any = model
    hidden = inner.config.get_text_config().hidden_size
    places = [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in _AFTER]
    places = [(name, module) for name, module in places if not any(name.startswith(f"{other}.") for other, _ in places)]
    if not places:
        raise ModelError(
            f"{type(model).__name__} has no self-attention that an adapter could follow; use tuning.method lora or full."
        )
    for _, module in places:
        module.add_module(NAME, Bottleneck(hidden, width, inner.dtype))
        module.register_forward_hook(_apply_adapter)
    return [name for name, _ in places]


def _apply_adapter(module: nn.Module, _: Any, output: Any) -> Any:
    adapter: Any = getattr(module, NAME)
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


def save_adapters(model: nn.Module, folder: Path, base: str) -> None:
    """Writes the adapters of `model` into `folder`, with `base` as the name of the base model."""
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if f".{NAME}." in name}
    places = sorted({name.partition(f".{NAME}.")[0] for name in weights})
    width = weights[f"{places[0]}.{NAME}.down.weight"].shape[0]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps({"method": "adapter", "base": base, "width": width, "after": places}, indent=2) + "\n")


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Adds to `model` the adapters that `save_adapters` wrote. Raises `ModelError` if they are for another architecture."""
    config = json.loads((folder / CONFIG).read_text())
    weights = load_file(folder / WEIGHTS)
    if sorted(add_adapters(model, config["width"])) != config["after"]:
        raise ModelError(f"the adapters in {folder} belong to another architecture; use them with {config['base']}.")
    own = model.state_dict()
    if odd := [name for name, value in weights.items() if name not in own or own[name].shape != value.shape]:
        raise ModelError(f"the adapters in {folder} do not fit: {odd[0]!r} has another shape; use them with {config['base']}.")
    model.load_state_dict(weights, strict=False)
