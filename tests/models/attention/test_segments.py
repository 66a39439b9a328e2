"""Attention of each example by itself is the attention that a mask over the whole sequence gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from apprentice.errors import ModelError
from apprentice.models.attention import segments
from apprentice.models.attention.segments import segment_attention

LAYER: Any = SimpleNamespace(is_causal=True)
SIZES = [3, 1, 4, 2]
STARTS = torch.tensor([0, 3, 4, 8, 10], dtype=torch.int32)


def states(heads: int, size: int = 8, rows: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randn(rows, heads, length, size, generator=torch.Generator().manual_seed(heads)).requires_grad_()


@pytest.mark.parametrize("together", [128, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 2, 50])
def test_outputs_and_gradients_are_those_of_a_mask(
    window: int | None, dtype: torch.dtype, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "TOGETHER", together)
    query, key, value = inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (states(4), states(2), states(2, 5))]
    exact = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    out, none = segment_attention(LAYER, query, key, value, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=STARTS)
    assert none is None
    assert out.shape == (2, 5, 4, 5)
    numbers = torch.arange(4).repeat_interleave(torch.tensor(SIZES))
    behind = torch.arange(10)[:, None] - torch.arange(10)
    mask = (numbers[:, None] == numbers) & (behind >= 0) & (behind < (window or 50))
    flat = [tensor.transpose(0, 1).reshape(1, tensor.shape[1], 10, -1) for tensor in inputs]
    expected = F.scaled_dot_product_attention(*flat, attn_mask=mask, scale=0.3, enable_gqa=True)
    expected = expected.transpose(1, 2).reshape(out.shape)
    torch.testing.assert_close(out, expected, **exact)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    for ours, theirs in zip(*(torch.autograd.grad((result * weights).sum(), inputs) for result in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, **exact)


def test_dropout_falls_on_the_weights_of_examples() -> None:
    torch.manual_seed(0)
    arguments: Any = (LAYER, states(2), states(2), states(2), None)
    whole, _ = segment_attention(*arguments, cu_seq_lens_q=STARTS)
    dropped, _ = segment_attention(*arguments, dropout=0.9, cu_seq_lens_q=STARTS)
    assert (dropped == 0).all(-1).any()
    assert not (whole == 0).any()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"attention_mask": torch.zeros(1)}, "mask"),
        ({"is_causal": False}, "causal"),
        ({"key": states(2, length=3)}, "cache"),
    ],
)
def test_what_it_does_not_do_is_refused(arguments: dict[str, Any], word: str) -> None:
    inputs = {name: states(2) for name in ("query", "key", "value")} | {"attention_mask": None, "cu_seq_lens_q": STARTS} | arguments
    with pytest.raises(ModelError, match=f"segments attention is .*{word}.*; set model.attention to sdpa"):
        segment_attention(LAYER, **inputs)


def test_lost_bounds_are_no_missing_bounds() -> None:
    with pytest.raises(ModelError, match="SimpleNamespace is not told where the examples of a row begin"):
        segment_attention(LAYER, states(2), states(2), states(2), None)


def test_short_examples_share_calls() -> None:
    assert segments._group([3, 1, 4, 2], 5) == [[3, 1], [4], [2]]
    assert segments._group([3, 1, 9, 2, 2, 1], 5) == [[3, 1], [9], [2, 2, 1]]
    assert segments._group([3, 1], 1) == [[3], [1]]
