"""Activation checkpointing: layers that keep only their input for the backward pass, and compute the rest again there.

    true        every layer
    selective   every second layer, which costs half the time of `true` and saves about half the memory
    offload     every layer, and its input waits in the host's memory

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from apprentice.errors import RecipeError
from apprentice.train.compat import set_checkpoint_function


def enable_activation_checkpointing(model: nn.Module, kind: bool | Literal["selective", "offload"]) -> None:
    """Turns on activation checkpointing in `model` as `kind`, the recipe's `training.activation_checkpointing`, says.

    Raises `RecipeError` for `selective` and `offload` with a model whose layers cannot be told apart.
    """
    if kind is False:
        return
    plain: Any = model
    # The second is the first one's name before transformers 5.23.
    enable = getattr(plain, "activation_checkpointing_enable", None) or plain.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if kind is True:
        return
    layers: list[Any] = [
        layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
    ]
    if not layers:
        raise RecipeError(
            f"training.activation_checkpointing {kind} needs to know the layers of {type(model).__name__}, and transformers does"
            " not say which they are; use true."
        )
    for number, layer in enumerate(layers):
        if kind == "selective":
            layer.gradient_checkpointing = number % 2 == 0
        else:
            set_checkpoint_function(layer, checkpoint_on_host)


def checkpoint_on_host(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, of which the backward pass finds only the inputs, in the host's memory, and computes the rest again."""
    with torch.autograd.graph.saved_tensors_hooks(_to_host, _from_host):  # inside, checkpointing has hooks of its own
        return checkpoint(function, *inputs, use_reentrant=False)


def _to_host(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
    """A function that brings `tensor` back from a copy in the host's memory; the tensor itself where it is there already."""
    if _is_on_host(tensor):
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    copy.copy_(tensor)
    return partial(copy.to, tensor.device, non_blocking=True)


def _from_host(kept: Tensor | Callable[[], Tensor]) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
