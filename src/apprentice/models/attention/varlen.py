"""Attention over one flat sequence of many examples, by PyTorch's `varlen_attn`, as an attention function of transformers.

Two rows of four tokens, with examples of 3, 1 and 4 tokens, are one sequence of 8 tokens with these bounds:

    a a a b | c c c c    cu_seq_lens_q 0 3 4 8, max_length_q 4

No token sees another example, and there is no mask: memory grows with the length of a row, not with its square. The bounds come
as transformers' own keyword arguments for flash attention, so that the same ones do for the flash-attention packages.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apprentice.errors import ModelError

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None

VARLEN = "varlen"  # name of the attention function in transformers


def register_varlen() -> None:
    """Makes `varlen_attention` known to transformers as `VARLEN`. It has no mask function, so transformers makes no mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, varlen_attention)


def has_varlen() -> bool:
    """Whether this PyTorch's `varlen_attn` can do what models need: a scale of their own and sliding windows (2.11 and later)."""
    return varlen_attn is not None and {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters)


def varlen_attention(
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
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention; queries, keys and values are (rows, heads, length, head size), the result (rows, length, heads, head size).

    The sequences are those of `cu_seq_lens_q`, int32 (sequences + 1,), in the rows laid end to end. `sliding_window` is the number
    of tokens that a token sees, itself among them. Raises `ModelError` for what the kernel has not (masks, dropout, soft caps,
    attention sinks, position biases, caches, attention that is not causal), and without bounds, which some architectures lose on
    their way to the layers: examples would see each other.
    """
    foreign = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if foreign or attention_mask is not None or dropout or not causal or key.shape[2] != query.shape[2]:
        lacking = foreign[0] if foreign else "mask, dropout or cache"
        raise ModelError(f"{VARLEN} attention is causal, without {lacking}; set model.attention to sdpa.")
    if cu_seq_lens_q is None or max_length_q is None:
        raise ModelError(f"{type(module).__name__} is not told where the examples of a row begin; set model.attention to sdpa.")
    rows, _, length, _ = query.shape
    dtype = common_dtype(query, value)
    query, key, value = (states.transpose(1, 2).flatten(0, 1).to(dtype) for states in (query, key, value))
    out = _attend(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    return out.unflatten(0, (rows, length)), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    """Calls PyTorch's kernel on queries, keys and values of shape (tokens, heads, head size)."""
    assert varlen_attn is not None, "has_varlen was asked before this attention was chosen"
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # PyTorch 2.11 and 2.12 promise nothing for fewer heads of keys than of queries
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    width = value.shape[-1]
    if width != query.shape[-1]:  # the kernel has one head size for all
        value = F.pad(value, (0, query.shape[-1] - width))
    before = -1 if window is None or window >= longest else window - 1  # tokens seen before a token itself
    out: Tensor = varlen_attn(
        query, key, value, starts, starts, longest, longest, scale=scaling, window_size=(before, 0), **options
    )
    return out if width == out.shape[-1] else out[..., :width]


def common_dtype(query: Tensor, value: Tensor) -> torch.dtype:
    """The number format to multiply in: autocast's, else that of the values. Rotary positions or norms may widen the others."""
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return value.dtype
