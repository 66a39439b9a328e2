"""Merging of LoRA's layers into the weights that they adapt: in float32, rounded so that 16 bits do not lose what was learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from apprentice.models.tuning.lora_forward import restore_base_layer
from apprentice.models.weights.rounding import round_merged


def layers_by_weight(model: nn.Module) -> dict[nn.Parameter, list[Any]]:
    """The weights of `model` that peft's layers adapt, in the model's order, each with its layers, which are to be merged."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[nn.Parameter, list[Any]] = {}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            restore_base_layer(layer)
            inner: Any = layer.get_base_layer()
            weight = getattr(inner, layer.parameter_name) if isinstance(layer, ParamWrapper) else inner.weight
            layers.setdefault(weight, []).append(layer)
    return layers


def merge_lora(model: Any, dtype: torch.dtype | None = None) -> Any:
    """The plain model in `model`, its LoRA layers merged. Adapted weights are then in `dtype`, by default in their own format.

    Each weight is merged by its layers' own `merge` of peft, in float32, and rounded (`round_merged`); its place among the adapted
    weights is the seed. Weights of 4 bits are merged as peft does.
    """
    layers_of = layers_by_weight(model)
    for place, (weight, layers) in enumerate(layers_of.items()):
        is_float, own = weight.is_floating_point(), weight.dtype
        if is_float:
            weight.data = weight.data.float()
        for layer in layers:
            layer.merge()
        if is_float:
            weight.data = round_merged(weight.data, dtype or own, place)
    return model.unload() if layers_of else model
