"""Attention of each example of packed rows by itself in T5 and mT5, with their bias by distance, on any device.

transformers' own T5 makes a bias of (heads, length, length) for whole rows, and one of zeros between decoder and encoder. Here a
bias is a number for each head and distance, and only an example's own (heads, queries, keys) is spread out, one after another:

    distances of an example of 3 tokens  −2 −1 0 1 2     bias  e d c b a     spread out   c b a
                                                                                          d c b
                                                                                          e d c

Where no example is longer than `BLOCK` tokens, the longest one's is spread out once for all layers, and others have a part of it
from its corner. A longer one is computed in blocks of so many queries, whose part of the bias is spread out again in the backward
pass, so that no (heads, length, length) numbers are kept for it.

Examples are told by sizes on the host: those of a row's examples in order, and last of its padding, which may be 0. An example has
the same number on both sides. Prompts of 3 and 2 tokens in a row of 6 with answers of 1 and 2 in a row of 3 are

    prompt_sizes ((3, 2, 1),)    answer_sizes ((1, 2, 0),)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from apprentice.errors import ModelError
from apprentice.models.attention.segments import cut_into_segments, join_segments

BLOCK = 256  # queries of an example that are computed at once
T5_SEGMENTS = "t5_segments"  # name of the attention function in transformers
TYPES = ("t5", "mt5")  # whose layers share the bias of their first; uMT5's do not
RowSizes = Sequence[Sequence[int]]
_HAS_HOOK = "_gives_bias_by_distance"


def register_t5_segments() -> None:
    """Makes `t5_segment_attention` known to transformers as `T5_SEGMENTS`; transformers makes no mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(T5_SEGMENTS, t5_segment_attention)


def add_bias_by_distance(model: nn.Module) -> None:
    """Lets every attention layer of `model` be given its bias by distance where sizes are given; otherwise nothing changes.

    They are hooks of the layers and not a part of the call, because activation checkpointing calls layers again.
    """
    for module in model.modules():
        if hasattr(module, "has_relative_attention_bias") and not hasattr(module, _HAS_HOOK):
            module.register_forward_pre_hook(_give_bias, with_kwargs=True)
            setattr(module, _HAS_HOOK, True)


def t5_segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    prompt_sizes: RowSizes | None = None,
    answer_sizes: RowSizes | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in an encoder, in a decoder, or from it to the encoder; shapes as in `segment_attention`.

    `position_bias` is the longest example's, (1, heads, longest, longest); where that is longer than `BLOCK`, by distance,
    (1, heads, 1, 2 · longest − 1) for −(longest − 1) … longest − 1 from a query to a key; and empty between decoder and encoder.
    Padding gets zeros. Raises `ModelError` for masks and without sizes.
    """
    if attention_mask is not None or prompt_sizes is None or answer_sizes is None or position_bias is None:
        raise ModelError(f"{type(module).__name__} is not told where the examples of a row begin; set model.attention to sdpa.")
    of_queries = answer_sizes if module.is_decoder else prompt_sizes
    of_keys = of_queries if module.is_causal or not module.is_decoder else prompt_sizes
    queries = cut_into_segments(query, list(chain(*of_queries)))
    keys, values = (cut_into_segments(states, list(chain(*of_keys))) for states in (key, value))
    is_padding = [number == len(row) - 1 for row in of_queries for number in range(len(row))]
    parts = []
    for padding, own, others, contents in zip(is_padding, queries, keys, values, strict=True):
        if padding or 0 in (own.shape[2], others.shape[2]):
            parts.append(torch.zeros_like(own))
            continue
        if position_bias.numel():
            parts += _attend_in_blocks(
                position_bias.to(own.dtype), own, others, contents, causal=module.is_causal, dropout_p=dropout, scale=scaling
            )
        else:
            parts.append(F.scaled_dot_product_attention(own, others, contents, dropout_p=dropout, scale=scaling))
    return join_segments(parts, len(query)), None


def _attend_in_blocks(bias: Tensor, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, **options: Any) -> list[Tensor]:
    """Attention within one example, in blocks of `BLOCK` queries; `bias` is as in `t5_segment_attention`."""
    length = query.shape[2]
    if bias.shape[2] == bias.shape[3]:
        return [F.scaled_dot_product_attention(query, key, value, attn_mask=bias[:, :, :length, :length], **options)]
    if length <= BLOCK:
        return [_attend(bias, query, key, value, 0, causal, options)]
    parts = []
    for first in range(0, length, BLOCK):
        last = min(first + BLOCK, length)
        seen = last if causal else length
        arguments = (bias, query[:, :, first:last], key[:, :, :seen], value[:, :, :seen], first, causal, options)
        keeps_state = bool(options["dropout_p"])
        parts.append(checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=keeps_state))
    return parts


def _attend(
    bias: Tensor, query: Tensor, key: Tensor, value: Tensor, first: int, causal: bool, options: Mapping[str, Any]
) -> Tensor:
    """Attention of an example's queries from number `first` on."""
    mask = _spread_out(bias, query.shape[2], key.shape[2], first, causal=causal)
    out: Tensor = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    return out


def _spread_out(bias: Tensor, queries: int, keys: int, first: int, *, causal: bool) -> Tensor:
    """The bias (1, heads, queries, keys) from query `first` of an example on, made of that by distance; causal or not."""
    middle = bias.shape[-1] // 2
    own = bias[:, :, 0, middle - first - queries + 1 : middle - first + keys]
    spread: Tensor = own.unfold(-1, keys, 1).flip(2)  # row i begins at distance -i
    if not causal:
        return spread
    return spread.masked_fill(torch.ones(queries, keys, dtype=torch.bool, device=bias.device).triu(1 + first), -torch.inf)


def _give_bias(module: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """Hook before a T5 attention layer: its bias, or none as an empty tensor. Later layers get that of the first."""
    own: RowSizes | None = keywords.get("answer_sizes" if module.is_decoder else "prompt_sizes")
    if own is None or keywords.get("position_bias") is not None:
        return None
    hidden: Tensor = arguments[0]
    if module.has_relative_attention_bias:
        longest = max([1, *(size for row in own for size in row[:-1])])
        # One query, behind which and before which there are as many keys as can be.
        bias = module.compute_bias(1, 2 * longest - 1, device=hidden.device, past_seen_tokens=longest - 1)
        if longest <= BLOCK:
            bias = _spread_out(bias, longest, longest, 0, causal=module.is_causal)
    else:
        bias = hidden.new_empty(0)
    return arguments, {**keywords, "position_bias": bias}
