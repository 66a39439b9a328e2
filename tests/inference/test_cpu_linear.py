"""Packed weights: the same numbers out of the same layers, in the order in which a CPU reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from apprentice.inference.cpu_linear import PackedLinear, can_pack, place_model
from apprentice.inference.kv_cache import KvCache
from apprentice.inference.runners.attention_metadata import TokenChunk
from apprentice.inference.runners.causal import compute_logits, probe_model
from apprentice.models.loading import load_model
from tests.conftest import NEEDS_BFLOAT16

pytestmark = pytest.mark.skipif(not can_pack(), reason=NEEDS_BFLOAT16)
SHAPES = [(64, 1), (7, 3), (64, 192), (576, 1536)]  # inputs and outputs


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_computes_what_it_did(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias).bfloat16()
    whole = torch.randn(2, 33, inputs).bfloat16()
    expected = torch.nn.functional.linear(whole.float(), layer.weight.float(), layer.bias.float() if bias else None)
    packed = place_model(nn.Sequential(layer), "cpu")[0]
    assert type(packed) is PackedLinear
    assert packed.weight.shape == (outputs, inputs)
    assert packed.weight.dtype == torch.bfloat16
    with torch.inference_mode():
        for inputs in (whole, whole[0], whole[0, 0], whole.transpose(0, 1), whole[:, :0]):
            assert packed(inputs).shape == (*inputs.shape[:-1], outputs)
        torch.testing.assert_close(packed(whole).float(), expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(packed(whole[1, 5:6]).float(), expected[1, 5:6], rtol=2e-2, atol=2e-2)


def test_a_model_keeps_its_embedding_and_what_is_no_bfloat16_layer(tiny_model: Path) -> None:
    model: Any = load_model(tiny_model, torch.bfloat16)
    embedding = model.get_input_embeddings().weight.clone()
    model = place_model(model, "cpu")
    packed = [name for name, part in model.named_modules() if type(part) is PackedLinear]
    assert "lm_head" in packed
    assert len(packed) == 1 + 7 * model.config.num_hidden_layers
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert model.dtype == torch.bfloat16
    plain: Any = place_model(load_model(tiny_model, torch.float32), "cpu")
    assert not [part for part in plain.modules() if type(part) is PackedLinear]


def test_a_packed_model_says_what_it_said(tiny_model: Path) -> None:
    ids = [(37 * place + 11) % 499 for place in range(40)]

    def logits(model: Any) -> torch.Tensor:
        probe_model(model)
        memory = KvCache(slots=2, context=64)
        compute_logits(model, memory, [TokenChunk(1, 0, ids[:30])])
        return compute_logits(model, memory, [TokenChunk(1, 30, ids[30:], all_logits=True)]).float()

    plain, packed = (logits(model) for model in (load_model(tiny_model, torch.bfloat16), placed_model(tiny_model)))
    assert float((plain - packed).abs().max()) <= 2e-2 * float(plain.abs().max())
    assert packed.shape == (10, plain.shape[1])


def test_a_packed_model_says_in_company_what_it_says_alone(tiny_model: Path) -> None:
    model = placed_model(tiny_model)
    probe_model(model)
    texts = [[(37 * place + start) % 499 for place in range(40)] for start in (11, 23, 5)]
    alone = []
    for text in texts:
        memory = KvCache(slots=3, context=64)
        compute_logits(model, memory, [TokenChunk(0, 0, text[:-1])])
        alone.append(compute_logits(model, memory, [TokenChunk(0, 39, text[-1:])])[0].float())
    memory = KvCache(slots=3, context=64)
    compute_logits(model, memory, [TokenChunk(slot, 0, text[:-1]) for slot, text in enumerate(texts)])
    together = compute_logits(model, memory, [TokenChunk(slot, 39, text[-1:]) for slot, text in enumerate(texts)]).float()
    # Sums of another order are rounded to bfloat16 otherwise; another text's logits are far from these.
    assert float((together - torch.stack(alone)).abs().max()) <= 2e-2 * float(together.abs().max())
    assert float((together[0] - together[1]).abs().max()) > 0.2 * float(together.abs().max())


def placed_model(folder: Path) -> Any:
    return place_model(load_model(folder, torch.bfloat16), "cpu")
