"""Private API of oneDNN (through PyTorch) and transformers that inference calls, each with the version it was read in.

tests/inference/test_compat.py fails where one of them is gone or means something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def pack_linear_weight(weight: Tensor) -> Tensor:
    """`weight` (outputs, inputs), bfloat16, in oneDNN's block layout; shape and dtype stay (PyTorch 2.13)."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def multiply_packed(inputs: Tensor, weight: Tensor, bias: Tensor | None, addition: Tensor | None = None) -> Tensor:
    """Linear layer with a weight from `pack_linear_weight`: `inputs` (…, inputs) → (…, outputs) (PyTorch 2.13).

    `addition` (…, outputs) is added before the product is rounded.
    """
    outputs: Tensor
    if addition is None:
        outputs = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
        return outputs
    outputs = torch.ops.mkldnn._linear_pointwise(inputs, addition, weight, None, "add")  # with a bias it takes three times as long
    return outputs if bias is None else outputs + bias


def attention_implementation(config: Any) -> str:
    """Name of the attention function that a model with this config calls (transformers 5.23)."""
    return str(config._attn_implementation)


@contextmanager
def using_attention(config: Any, name: str) -> Iterator[None]:
    """Within it, the model with this config calls the attention function registered as `name` (transformers 5.23).

    transformers' own `set_attn_implementation` loads kernels and walks through all submodels, which is too slow for every pass.
    """
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def relative_position_buckets(attention: Any, distances: Tensor) -> Tensor:
    """Bucket of each distance (key position less query position) in a T5 attention layer (transformers 5.23)."""
    buckets: Tensor = attention._relative_position_bucket(
        distances,
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return buckets
