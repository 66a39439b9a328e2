"""Attention over one flat sequence is that of each example by itself."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from apprentice.errors import ModelError
from apprentice.models.attention import varlen
from apprentice.models.attention.varlen import has_varlen, varlen_attention
from tests.models.attention import varlen_stand_in

LAYER: Any = SimpleNamespace(is_causal=True)
STARTS = torch.tensor([0, 3, 4, 10], dtype=torch.int32)


def states(rows: int, heads: int, length: int, size: int = 8) -> torch.Tensor:
    return torch.randn(rows, heads, length, size, generator=torch.Generator().manual_seed(heads))


@pytest.mark.parametrize("kernel", [varlen_stand_in.varlen_attn, varlen_stand_in.varlen_attn_of_2_11])
@pytest.mark.parametrize("window", [None, 1, 2, 50])
def test_each_sequence_by_itself(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Any], window: int | None) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    query, key, value = states(1, 4, 10), states(1, 2, 10), states(1, 2, 10, 5)
    out, none = varlen_attention(
        LAYER, query, key, value, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=STARTS, max_length_q=6
    )
    assert none is None
    assert out.shape == (1, 10, 4, 5)
    for first, last in ((0, 3), (3, 4), (4, 10)):
        behind = torch.arange(last - first)[:, None] - torch.arange(last - first)
        mask = (behind >= 0) & (behind < (window or 50))
        parts = (tensor[:, :, first:last] for tensor in (query, key, value))
        expected = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(out[:, first:last], expected.transpose(1, 2))


def test_rows_are_laid_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_stand_in.varlen_attn)
    query, key, value = states(3, 2, 5), states(3, 1, 5), states(3, 1, 5)
    starts = torch.tensor([0, 5, 10, 15], dtype=torch.int32)
    out, _ = varlen_attention(LAYER, query, key, value, None, cu_seq_lens_q=starts, max_length_q=5)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_it_multiplies_in_the_values_number_format_or_autocasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_stand_in.varlen_attn)
    wide, narrow = states(1, 2, 10), states(1, 2, 10).bfloat16()
    bounds: dict[str, Any] = {"cu_seq_lens_q": STARTS, "max_length_q": 6}
    assert varlen_attention(LAYER, wide, wide, narrow, None, **bounds)[0].dtype == torch.bfloat16
    assert varlen_attention(LAYER, wide, wide, wide, None, **bounds)[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert varlen_attention(LAYER, wide, wide, wide, None, **bounds)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"dropout": 0.1}, "dropout"),
        ({"attention_mask": torch.zeros(1)}, "mask"),
        ({"is_causal": False}, "causal"),
        ({"key": states(1, 2, 5)}, "cache"),
    ],
)
def test_what_the_kernel_has_not_is_not_left_out_silently(arguments: dict[str, Any], word: str) -> None:
    inputs = {name: states(1, 2, 4) for name in ("query", "key", "value")} | {"attention_mask": None} | arguments
    with pytest.raises(ModelError, match=f"varlen attention is .*{word}.*; set model.attention to sdpa"):
        varlen_attention(LAYER, **inputs)


def test_lost_bounds_are_no_missing_bounds() -> None:
    query = states(1, 2, 4)
    with pytest.raises(ModelError, match="SimpleNamespace is not told where the examples of a row begin"):
        varlen_attention(LAYER, query, query, query, None)


def test_the_kernel_of_this_pytorch_is_known_and_older_ones_by_their_keywords(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_varlen()
    known = {varlen_stand_in.varlen_attn_of_2_10: False, varlen_stand_in.varlen_attn_of_2_11: True, None: False}
    for kernel, expected in known.items():
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        assert has_varlen() is expected
