"""Activation checkpointing changes what is kept, and no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, T5Config

from apprentice.errors import RecipeError
from apprentice.train.engine import activation_checkpointing
from apprentice.train.engine.activation_checkpointing import enable_activation_checkpointing

LAYERS, IDS = 4, torch.arange(1, 25).view(2, 12)
Kind = bool | str


def llama() -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=LAYERS, attention_dropout=0.1)
    return AutoModelForCausalLM.from_config(config)


def t5() -> nn.Module:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=LAYERS, decoder_start_token_id=0)
    return AutoModelForSeq2SeqLM.from_config(config)


def gradients(make: Callable[[], nn.Module], kind: Kind) -> tuple[dict[str, Tensor], int]:
    """Gradients of one step with dropout, and the number of bytes that its forward pass keeps."""
    torch.manual_seed(0)
    model: Any = make().train()
    enable_activation_checkpointing(model, kind)
    kept: dict[int, int] = {}
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("make", [llama, t5])
def test_gradients_are_the_same_and_less_is_kept(make: Callable[[], nn.Module]) -> None:
    plain, everything = gradients(make, False)
    kept = {}
    for kind in (True, "selective", "offload"):
        ours, kept[kind] = gradients(make, kind)
        # T5's layers share a position bias, whose gradients are added up in another order.
        torch.testing.assert_close(ours, plain, rtol=0 if make is llama else 1e-5, atol=0 if make is llama else 1e-6)
    assert kept[True] < kept["selective"] < everything


@pytest.mark.parametrize(("make", "layers"), [(llama, LAYERS), (t5, 2 * LAYERS)])
def test_inputs_wait_on_the_host(make: Callable[[], nn.Module], layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device is stood in for by tensors that are said not to be on the host."""
    plain, _ = gradients(make, True)
    copies: list[torch.Size] = []
    to_host = activation_checkpointing._to_host

    def watched(tensor: Tensor) -> Any:
        kept = to_host(tensor)
        if not isinstance(kept, Tensor):
            copies.append(tensor.shape)
        return kept

    monkeypatch.setattr(activation_checkpointing, "_is_on_host", lambda tensor: False)
    monkeypatch.setattr(activation_checkpointing, "_to_host", watched)
    ours, _ = gradients(make, "offload")
    assert [shape for shape in copies if shape == (2, 12, 32)][:layers] == [(2, 12, 32)] * layers
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_a_model_whose_layers_are_not_known() -> None:
    class Plain(nn.Module):
        def gradient_checkpointing_enable(self, settings: dict[str, Any]) -> None:
            self.settings = settings

    with pytest.raises(
        RecipeError, match=r"^training.activation_checkpointing selective needs to know the layers of Plain, .* use true\.$"
    ):
        enable_activation_checkpointing(Plain(), "selective")
    model = Plain()
    enable_activation_checkpointing(model, True)
    assert model.settings == {"use_reentrant": False}
