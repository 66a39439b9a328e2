"""A stand-in for PyTorch's `varlen_attn`, with the parameters that are used of it, which runs anywhere, in any number format."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of each sequence by itself, spelt out; shapes (tokens, heads, head size)."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    starts = cu_seq_q.tolist()
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == max(last - first for first, last in pairwise(starts))
    assert (starts[0], starts[-1]) == (0, len(query))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = []
    for first, last in pairwise(starts):
        own = slice(first, last)
        scores = torch.einsum("qhd,khd->hqk", query[own], key[own]) * (query.shape[-1] ** -0.5 if scale is None else scale)
        places = torch.arange(last - first)
        behind = places[:, None] - places[None]  # how many tokens the key stands before the query
        left, right = window_size
        hidden = torch.zeros_like(behind, dtype=torch.bool)
        if left >= 0:
            hidden |= behind > left
        if right >= 0:
            hidden |= -behind > right
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, value[own]))
    return torch.cat(parts)


def varlen_attn_of_2_11(*arguments: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """The same with the keywords of PyTorch 2.11, which has none for fewer heads of keys."""
    return varlen_attn(*arguments, scale=scale, window_size=window_size)


def varlen_attn_of_2_10(*arguments: Any, is_causal: bool = False) -> Tensor:
    """The same with the keywords of PyTorch 2.10, which has neither scale nor windows."""
    raise NotImplementedError
