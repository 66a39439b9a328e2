"""Ulysses attention: workers that share a long sequence swap tokens for heads before attention, and back after it.

Each of two workers holds half of the tokens 0 … 7 with all heads A … D; within attention each has all tokens and half of the heads.

    worker 0   tokens 0 1 2 3, heads A B C D            all tokens, heads A B            tokens 0 1 2 3, heads A B C D
                                              ─all-to-all▶           ─attention─all-to-all▶
    worker 1   tokens 4 5 6 7, heads A B C D            all tokens, heads C D            tokens 4 5 6 7, heads A B C D

All else in a model (norms, projections, experts, losses) takes each token by itself, so activations are divided by the number of
workers. The sequence may be many packed examples: the bounds of all of them are given, and no token sees another example.

Source: Jacobs et al. 2023, DeepSpeed Ulysses, arXiv 2309.14509. Ours is not DeepSpeed's code, which drops masks.
"""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apprentice.errors import ModelError
from apprentice.models.attention.segments import segment_attention
from apprentice.models.attention.varlen import common_dtype, has_varlen, varlen_attention

ULYSSES = "ulysses"  # name of the attention function in transformers
_NARROW = (torch.bfloat16, torch.float16)  # all that PyTorch's varlen kernel multiplies
_OLDEST, _LARGEST_HEAD = (8, 0), 256  # compute capability from which on it runs, and size of heads


class SharedSequence(NamedTuple):
    """The sequence of which each worker of `group` holds an equal part, in order of rank: bounds of its examples.

    `starts`, int32 (examples + 1,), says where they begin in the whole sequence, and where it ends; `longest` is the number of
    tokens of the longest. It goes through a model as its keyword argument `shared_sequence`.
    """

    starts: Tensor
    longest: int
    group: dist.ProcessGroup


def register_ulysses() -> None:
    """Makes `ulysses_attention` known to transformers as `ULYSSES`. It has no mask function, so transformers makes no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(ULYSSES, ulysses_attention)


def ulysses_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_sequence: SharedSequence | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of a sequence that workers share; all of its group must call it.

    Queries, keys and values are (1, heads, this worker's tokens, head size), the result (1, tokens, heads, head size). Keys and
    values with fewer heads than workers are repeated. Without `shared_sequence` every worker has the whole sequence, whose bounds
    come as in `varlen_attention`. Raises `ModelError` for what that has not.
    """
    if shared_sequence is None:
        return _attend(module, query, key, value, attention_mask, **others)
    starts, longest, group = shared_sequence
    size = dist.get_world_size(group)
    if query.shape[1] % size:
        raise ModelError(f"{query.shape[1]} heads cannot be divided among {size} workers (training.sequence_parallel).")
    copies = size // gcd(key.shape[1], size)  # of each head of keys, so that all workers have equally many
    key, value = (states.repeat_interleave(copies, dim=1) for states in (key, value))
    dtype = common_dtype(query, value)
    query, key, value = (_swap_tokens_for_heads(states.to(dtype), group, size) for states in (query, key, value))
    bounds = {"cu_seq_lens_q": starts, "max_length_q": longest}
    out, _ = _attend(module, query, key, value, attention_mask, **(others | bounds))
    return _swap_heads_for_tokens(out, group, size), None


def _swap_tokens_for_heads(states: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
    """(1, heads, tokens of this worker, head size) to (1, heads of this worker, all tokens, head size)."""
    received = exchange(states[0].unflatten(0, (size, -1)), group)  # (worker, its part of the heads, tokens, head size)
    return received.transpose(0, 1).flatten(1, 2)[None]


def _swap_heads_for_tokens(states: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
    """(1, all tokens, heads of this worker, head size) to (1, tokens of this worker, heads, head size)."""
    received = exchange(states[0].unflatten(0, (size, -1)), group)  # (worker, tokens, its part of the heads, head size)
    return received.transpose(0, 1).flatten(1, 2)[None]


def exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-to-all: `parts[r]` goes to worker r, and the result's part r is what came from there. Gradients go the same way back."""
    function: Any = _Exchange  # PyTorch's `apply` has no types
    received: Tensor = function.apply(parts, group)
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.group = group
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        return _Exchange.forward(context, gradient, context.group), None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """Attention over whole sequences: PyTorch's varlen kernel where it runs, else example by example."""
    head = max(query.shape[-1], value.shape[-1])
    fits = common_dtype(query, value) in _NARROW and head % 8 == 0 and head <= _LARGEST_HEAD and not others.get("dropout")
    runs = fits and query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) >= _OLDEST and has_varlen()
    attend = varlen_attention if runs else segment_attention
    return attend(module, query, key, value, mask, **others)
