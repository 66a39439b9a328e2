"""Attention of each example of packed rows by itself, by PyTorch's `scaled_dot_product_attention`, for causal models on CPUs.

The rows come laid end to end, with the bounds that `varlen.py` describes, and are cut there: examples of 3, 1 and 4 tokens cost
9 + 1 + 16 products of a query and a key, where a mask over the whole sequence has 64. There is no mask, unless an example is longer
than a sliding window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apprentice.errors import ModelError

SEGMENTS = "segments"  # name of the attention function in transformers


def register_segments() -> None:
    """Makes `segment_attention` known to transformers as `SEGMENTS`. It has no mask function, so transformers makes no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(SEGMENTS, segment_attention)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention; queries, keys and values are (rows, heads, length, head size), the result (rows, length, heads, head size).

    The sequences are those of `cu_seq_lens_q`, int32 (sequences + 1,), in the rows laid end to end. `sliding_window` is the number
    of tokens that a token sees, itself among them. Raises `ModelError` for masks, soft caps, attention sinks, position biases,
    caches and attention that is not causal, and without bounds: examples would see each other.
    """
    foreign = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if foreign or attention_mask is not None or not causal or key.shape[2] != query.shape[2]:
        raise ModelError(
            f"{SEGMENTS} attention is causal, without {(foreign or ['mask or cache'])[0]}; set model.attention to sdpa."
        )
    if cu_seq_lens_q is None:
        raise ModelError(f"{type(module).__name__} is not told where the examples of a row begin; set model.attention to sdpa.")
    sizes = cu_seq_lens_q.diff().tolist()
    parts = []
    for queries, keys, values in zip(*(cut_into_segments(states, sizes) for states in (query, key, value)), strict=True):
        length = queries.shape[2]
        band = None if sliding_window is None or sliding_window >= length else _band(length, sliding_window, query.device)
        parts.append(
            F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=band, dropout_p=dropout, is_causal=band is None, scale=scaling, enable_gqa=True
            )
        )
    return join_segments(parts, len(query)), None


def cut_into_segments(states: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """The segments of `states` (rows, heads, length, head size) laid end to end, each (1, heads, its size, head size)."""
    flat = states if len(states) == 1 else states.transpose(0, 1).flatten(1, 2)[None]
    # One operator for all, whose gradient is one concatenation; that of each slice would be as large as the whole.
    parts: Sequence[Tensor] = flat.split(list(sizes), dim=2)
    return parts


def join_segments(parts: Sequence[Tensor], rows: int) -> Tensor:
    """Reverse of `cut_into_segments`, with heads behind the length: (rows, length, heads, head size)."""
    joined: Tensor = torch.cat([part.transpose(1, 2) for part in parts], dim=1).unflatten(1, (rows, -1))[0]
    return joined


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Boolean mask (length, length): each token sees itself and the `window` - 1 tokens before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)
