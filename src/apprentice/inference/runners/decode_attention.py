"""Decode attention: one new token of each sequence over the keys and values of its slot, for adjacent slots in one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from apprentice.inference.runners.attention_metadata import DecodeGroup


def attend_groups(
    query: Tensor, keys: Tensor, values: Tensor, masks: Sequence[tuple[DecodeGroup, Tensor]], scale: float | None
) -> Tensor:
    """Attention of sequences that add one token each, group by group. Returns (tokens, query heads, width).

    `query` is (tokens, key heads, query heads of each key head, width); `keys` and `values` are the cache of a whole layer; the
    mask of a group is (sequences, key heads, 1, positions), in the cache's dtype. On a CPU PyTorch's own attention multiplies head
    by head; here all heads of a group are one product.
    """
    tokens, heads, shared, width = query.shape
    scale = width**-0.5 if scale is None else scale
    if keys.device.type != "cpu":
        parts = []
        for group, mask in masks:
            of_slots = slice(group.slot, group.slot + group.count)
            group_keys, group_values = keys[of_slots, :, : group.length], values[of_slots, :, : group.length]
            group_query = query[group.first : group.first + group.count]
            parts.append(scaled_dot_product_attention(group_query, group_keys, group_values, attn_mask=mask, scale=scale))
        return torch.cat(parts).flatten(1, 2)
    scaled = (query.to(keys.dtype) * scale).reshape(tokens * heads, shared, width)
    result = scaled.new_empty(tokens * heads, shared, values.shape[-1])
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    for group, mask in masks:
        rows = slice(group.first * heads, (group.first + group.count) * heads)
        slots = slice(group.slot * heads, (group.slot + group.count) * heads)
        scores = torch.baddbmm(mask.flatten(0, 1), scaled[rows], keys[slots, : group.length].transpose(1, 2))
        torch.bmm(scores.softmax(dim=-1), values[slots, : group.length], out=result[rows])
    return result.view(tokens, heads * shared, -1).to(query.dtype)
