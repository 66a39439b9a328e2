"""Attention whose rows workers share: what one process shows of it. tests/train/engine/test_shared_rows.py has the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GraniteSWAForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from apprentice.errors import ModelError
from apprentice.models.attention import varlen
from apprentice.models.attention.backend_choice import PackedCompute, check_shared_rows, choose_attention, is_flat
from apprentice.models.attention.ulysses import ULYSSES, ulysses_attention
from apprentice.models.attention.varlen import varlen_attention
from tests.models.architectures import made
from tests.models.attention import varlen_stand_in

LAYER: Any = SimpleNamespace(is_causal=True)
BOUNDS: dict[str, Any] = {"cu_seq_lens_q": torch.tensor([0, 3, 4, 10], dtype=torch.int32), "max_length_q": 6}


def states(heads: int, size: int = 8) -> torch.Tensor:
    return torch.randn(1, heads, 10, size, generator=torch.Generator().manual_seed(heads))


@pytest.mark.parametrize("window", [None, 1, 2, 50])
def test_whole_sequences_are_attended_to_as_varlen_does(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_stand_in.varlen_attn)
    arguments: dict[str, Any] = {"scaling": 0.3, "sliding_window": window} | BOUNDS
    query, key, value = states(4), states(2), states(2, 5)
    ours, _ = ulysses_attention(LAYER, query, key, value, None, **arguments)
    expected, _ = varlen_attention(LAYER, query, key, value, None, **arguments)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("arguments", [{"softcap": 50.0}, {"s_aux": torch.zeros(2)}, {"is_causal": False}, {"cu_seq_lens_q": None}])
def test_what_it_has_not_is_not_left_out_silently(arguments: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        ulysses_attention(LAYER, states(2), states(2), states(2), None, **(BOUNDS | arguments))


def choose(name: str, workers: int) -> str | None:
    model = made(name)
    return choose_attention("auto", PackedCompute("cpu", torch.float32, sequence_parallel=workers), model.config, type(model))


def test_it_is_chosen_where_workers_share_rows() -> None:
    assert choose("llama", 2) == ULYSSES
    assert is_flat(ULYSSES)
    assert choose("llama", 1) != ULYSSES


@pytest.mark.parametrize(
    ("name", "workers", "reason"),
    [
        ("llama", 3, "3 does not divide the [0-9]+ attention heads of llama"),
        ("gemma2", 2, "2 cannot be used with gemma2"),
        ("t5", 2, "2 is for causal models, and t5 is an encoder-decoder"),
        ("bloom", 2, "2 cannot be used with bloom"),
    ],
)
def test_models_whose_rows_cannot_be_shared_are_refused(name: str, workers: int, reason: str) -> None:
    with pytest.raises(ModelError, match=rf"training\.sequence_parallel {reason}"):
        choose(name, workers)


def test_attention_sinks_are_refused() -> None:
    config = AutoConfig.for_model("granite_swa")
    with pytest.raises(
        ModelError, match=r"training\.sequence_parallel 2 cannot be used with granite_swa, whose attention takes more"
    ):
        check_shared_rows(2, config, GraniteSWAForCausalLM)


FACTORS = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("rope", [{"rope_type": "longrope", "factor": 2.0, **FACTORS}, {"rope_type": "dynamic", "factor": 2.0}])
@pytest.mark.parametrize("by_layer", [False, True])
def test_rotary_positions_that_depend_on_whole_rows_are_refused(rope: dict[str, Any], by_layer: bool) -> None:
    model = made("llama")
    check_shared_rows(2, model.config, type(model))
    model.config.rope_parameters = {"full_attention": rope} if by_layer else rope
    kind = rope["rope_type"]
    with pytest.raises(ModelError, match=rf"2 cannot be used with llama, whose rotary positions \({kind}\) depend on the length"):
        check_shared_rows(2, model.config, type(model))


def test_frequencies_of_a_part_are_not_those_of_its_row() -> None:
    """Why such models are refused: should transformers change this, they need not be."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, **FACTORS}
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=128, rope_parameters=rope)
    rotary = LlamaRotaryEmbedding(config)
    whole, _ = rotary(torch.zeros(1), torch.arange(100)[None])
    part, _ = rotary(torch.zeros(1), torch.arange(50)[None])
    assert not torch.allclose(part, whole[:, :50])
