"""Private API of oneDNN and transformers still is what inference takes it for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from apprentice.inference.compat import (
    attention_implementation,
    multiply_packed,
    pack_linear_weight,
    relative_position_buckets,
    using_attention,
)
from apprentice.inference.cpu_linear import can_pack
from tests.conftest import NEEDS_BFLOAT16
from tests.models.architectures import made


@pytest.mark.skipif(not can_pack(), reason=NEEDS_BFLOAT16)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_packed_weight_has_its_shape_and_multiplies_as_before(has_bias: bool) -> None:
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.ones(48).bfloat16() if has_bias else None
    inputs = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.no_grad():
        packed = pack_linear_weight(weight)
        outputs = multiply_packed(inputs, packed, bias)
    assert (packed.shape, packed.dtype, outputs.shape) == (weight.shape, torch.bfloat16, (3, 5, 48))
    torch.testing.assert_close(outputs, torch.nn.functional.linear(inputs, weight, bias), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_a_model_calls_the_attention_that_its_config_names(name: str) -> None:
    model = made(name)
    calls: list[Any] = []

    def recording(module: Any, query: torch.Tensor, *arguments: Any, **options: Any) -> tuple[torch.Tensor, None]:
        calls.append(options.get("marker"))
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("apprentice_test", recording)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    side = model
    if model.config.is_encoder_decoder:
        side = model.get_encoder()
    before = attention_implementation(side.config)
    with torch.no_grad(), using_attention(side.config, "apprentice_test"):
        assert attention_implementation(side.config) == "apprentice_test"
        side(**inputs, marker="reaches the attention function")
    assert calls == ["reaches the attention function"] * 2  # one call for each layer
    assert attention_implementation(side.config) == before
    with pytest.raises(ValueError, match="in between"), using_attention(side.config, "apprentice_test"):
        raise ValueError("in between")
    assert attention_implementation(side.config) == before


def test_t5s_buckets_are_exact_nearby_and_its_decoder_looks_back_only() -> None:
    model = made("t5")
    distances = torch.arange(-3, 4)
    for side, expected in ((model.encoder, [3, 2, 1, 0, 17, 18, 19]), (model.decoder, [3, 2, 1, 0, 0, 0, 0])):
        attention = side.block[0].layer[0].SelfAttention
        assert attention.relative_attention_num_buckets == 32
        assert relative_position_buckets(attention, distances).tolist() == expected
