"""Packed examples do not see each other, and the loss at target places only is the whole loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from apprentice.train.loss import TargetLoss
from tests.train.rows import examples_of, packed_rows, reference_nll

SIZES: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32)),
    "gemma2_with_soft_caps": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=32, final_logit_softcapping=0.5, pad_token_id=0)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
}
CASES = [
    (name, attention)
    for name in MODELS
    for attention in ("sdpa", "eager")
    if (name, attention) != ("gemma2_with_soft_caps", "sdpa")
]


def made(name: str, attention: str) -> Any:
    torch.manual_seed(1)
    model = MODELS[name]()
    model.set_attn_implementation(attention)
    return model.eval()


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_packed_logits_are_unpacked_logits(name: str, attention: str) -> None:
    model = made(name, attention)
    rows = packed_rows(2)
    micro = rows.micros(2)[0]
    with torch.no_grad():
        packed = model(input_ids=micro.input_ids, position_ids=micro.positions, use_cache=False).logits
        alone = [model(input_ids=ids[None], use_cache=False).logits[0] for ids, _ in examples_of(rows)]
    segments = [
        packed[row][torch.tensor(rows.segment_ids[row, : packed.shape[1]] == segment)]
        for row in range(2)
        for segment in range(1, int(rows.segment_ids[row].max()) + 1)
    ]
    assert len(segments) == len(alone) >= 4
    for together, by_itself in zip(segments, alone, strict=True):
        torch.testing.assert_close(together, by_itself, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_loss_and_gradients_are_those_of_single_examples(name: str, attention: str) -> None:
    model = made(name, attention)
    rows = packed_rows(2)
    micro = rows.micros(2)[0]
    loss = TargetLoss(model)(micro.input_ids, micro.positions, micro.is_target)
    loss.backward()
    ours = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    reference = reference_nll(model, rows)
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)
    assert ours
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(ours[key], parameter.grad, rtol=1e-4, atol=1e-4, msg=key)


def test_bfloat16_loss_is_near() -> None:
    rows = packed_rows(2)
    micro = rows.micros(2)[0]
    arguments = (micro.input_ids, micro.positions, micro.is_target)
    exact = TargetLoss(made("llama", "sdpa"))(*arguments)
    rough = TargetLoss(made("llama", "sdpa").to(torch.bfloat16))(*arguments)
    assert rough.dtype == torch.float32
    assert abs(rough.item() - exact.item()) / exact.item() < 1e-3


def test_a_model_without_an_output_layer_of_its_own() -> None:
    class Headless(nn.Module):
        """Gives all logits, whatever is asked."""

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def get_output_embeddings(self) -> None:
            return None

        def forward(self, **arguments: Any) -> Any:
            return self.inner(**arguments)

    model = made("llama", "sdpa")
    micro = packed_rows(2).micros(2)[0]
    arguments = (micro.input_ids, micro.positions, micro.is_target)
    torch.testing.assert_close(TargetLoss(Headless(model))(*arguments), TargetLoss(model)(*arguments))


def test_no_target_gives_zero_and_no_trace_of_the_hook() -> None:
    model = made("llama", "sdpa")
    micro = packed_rows(1).micros(1)[0]
    loss = TargetLoss(model)(micro.input_ids, micro.positions, torch.zeros_like(micro.is_target))
    loss.backward()
    assert loss.item() == 0.0
    assert not model.get_output_embeddings()._forward_pre_hooks
