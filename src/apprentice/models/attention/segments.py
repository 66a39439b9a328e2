"""Attention of each example of packed rows by itself, by PyTorch's `scaled_dot_product_attention`, for causal models on CPUs.

The rows come laid end to end, with the bounds that `varlen.py` describes, and are cut there: examples of 3, 1 and 4 tokens cost
9 + 1 + 16 products of a query and a key, where a mask over the whole sequence has 64. There is no mask, unless an example is longer
than a sliding window, or short examples share a call: in 16 bits small products cost more than those that a mask throws away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apprentice.errors import ModelError

SEGMENTS = "segments"  # name of the attention function in transformers
TOGETHER = 128  # tokens of short examples in one call, in 16 bits


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
    sizes = [size for size in cu_seq_lens_q.diff().tolist() if size]
    groups = _group(sizes, TOGETHER if query.dtype.itemsize == 2 else 1)
    totals = [sum(group) for group in groups]
    parts = []
    states = (cut_into_segments(tensor, totals) for tensor in (query, key, value))
    for group, queries, keys, values in zip(groups, *states, strict=True):
        has_mask = len(group) > 1 or (sliding_window is not None and sliding_window < group[0])
        mask = _mask(group, sliding_window, query.device) if has_mask else None
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        parts.append(out)
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


def _group(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Sizes of neighbours that are attended to in one call: as many as have at most `most` tokens together, at least one."""
    groups: list[list[int]] = []
    for size in sizes:
        if groups and sum(groups[-1]) + size <= most:
            groups[-1].append(size)
        else:
            groups.append([size])
    return groups


def _mask(sizes: Sequence[int], window: int | None, device: torch.device) -> Tensor:
    """Boolean mask of examples of these sizes: each token sees itself and those before it in its example and the `window`."""
    numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)
    seen = (numbers[:, None] == numbers).tril()
    return seen if window is None else seen.triu(1 - window)
