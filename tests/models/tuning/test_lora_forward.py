"""LoRA's forward pass in 16 bits: additions below half a step of the outputs are not lost; float32 is peft's, bit by bit."""

import weakref
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import nn

from apprentice.models.tuning.lora_forward import AddingLinear
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.recipe import Tuning
from tests.models.architectures import made

LORA = TUNING_METHODS["lora"]


def tuned(dtype: torch.dtype, size: float = 1e-3, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = LORA.wrap(made("qwen2"), Tuning.model_validate({"method": "lora", "rank": 4} | changes), 3).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * size).to(dtype)
    return model


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def kept_share(layer: Any, inputs: torch.Tensor) -> float:
    """Part of what the adapter adds that is in the outputs: 1 where, on average, all of it is."""
    wide = inputs.float()
    base = nn.functional.linear(
        wide, layer.base_layer.weight.float(), None if layer.base_layer.bias is None else layer.base_layer.bias.float()
    )
    addition = (wide @ layer.lora_A["default"].weight.float().T @ layer.lora_B["default"].weight.float().T) * layer.scaling[
        "default"
    ]
    return float(((layer(inputs).float() - base) * addition).sum() / addition.pow(2).sum())


def test_small_additions_are_in_the_outputs_of_bfloat16_on_average() -> None:
    torch.manual_seed(2)
    layer = LORA.wrap(made("llama"), Tuning(method="lora", rank=4), 3).to(torch.bfloat16)
    (layer, *_) = layers_of(layer)
    layer.base_layer.weight.data = torch.randn(layer.base_layer.weight.shape).bfloat16()  # outputs of about 8: steps of 1/16
    layer.lora_B["default"].weight.data = (torch.randn(layer.lora_B["default"].weight.shape) * 2e-3).bfloat16()
    inputs = torch.randn(4096, layer.in_features).bfloat16()
    with torch.no_grad():
        assert kept_share(layer, inputs) == pytest.approx(1.0, abs=0.2)
        by_peft = Linear.forward(layer, inputs).float()
        rounded_base = layer.base_layer(inputs).float()
        changed = (by_peft != rounded_base).float().mean()
    assert changed < 0.2  # peft's outputs are nearly all the base's, which is what this is about


@pytest.mark.parametrize("changes", [{}, {"rslora": True}, {"dropout": 0.5}, {"dora": True}])
def test_float32_is_that_of_peft_and_the_gradients_of_bfloat16_agree(changes: dict[str, Any]) -> None:
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    model = tuned(torch.float32, 0.05, **changes)
    ours = {}
    for is_ours in (True, False):
        if not is_ours:
            for layer in layers_of(model):
                layer.__class__ = Linear if type(layer).__name__ == "AddingLoraLinear" else type(layer)
        torch.manual_seed(5)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
        ours = ours or gradients
    assert all(torch.equal(gradient, ours[name]) for name, gradient in gradients.items())
    narrow = tuned(torch.bfloat16, 0.05, **(changes | {"dropout": 0.0}))
    wide = tuned(torch.float32, 0.05, **(changes | {"dropout": 0.0}))
    for one in (narrow, wide):
        one(input_ids=ids, labels=ids).loss.backward()
    names = [name for name, parameter in wide.named_parameters() if parameter.grad is not None]
    (flat_narrow, flat_wide) = (
        torch.cat([dict(m.named_parameters())[name].grad.float().flatten() for name in names]) for m in (narrow, wide)
    )
    assert nn.functional.cosine_similarity(flat_narrow, flat_wide, dim=0) > 0.98


def test_a_merged_model_has_plain_linear_layers_and_a_disabled_adapter_is_left_out() -> None:
    model, ids = tuned(torch.bfloat16, 0.5), torch.tensor([[3, 4, 5]])
    untouched = tuned(torch.bfloat16, 0.0)  # as training begins: qwen2's layers have biases
    with torch.no_grad():
        begun = untouched(input_ids=ids).logits
        with untouched.disable_adapter():
            assert torch.equal(begun, untouched(input_ids=ids).logits)
    assert any(type(module) is AddingLinear for module in model.modules())
    with torch.no_grad():
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        assert not torch.equal(base, model(input_ids=ids).logits)
        assert torch.equal(base, begun)
        adapted = model(input_ids=ids).logits
        assert LORA.merge is not None
        merged = LORA.merge(model)
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted, atol=0.05, rtol=0.05)
    assert all(type(module) is nn.Linear for module in merged.modules() if isinstance(module, nn.Linear))


def test_a_split_weight_is_not_held_from_the_forward_to_the_backward_pass() -> None:
    """As ZeRO-3 does: the weight is taken away behind the forward pass, and gathered again before the backward pass."""
    torch.manual_seed(0)
    layer = AddingLinear(64, 48, bias=False).bfloat16().requires_grad_(False)
    whole = layer.weight.data.clone()
    inputs = torch.randn(5, 64).bfloat16().requires_grad_()
    addition = torch.randn(5, 48).bfloat16().requires_grad_()
    layer.weight.data = gathered = whole.clone()
    memory = weakref.ref(gathered.untyped_storage())
    outputs = layer(inputs, addition)
    layer.weight.data = torch.empty(0, dtype=torch.bfloat16)
    del gathered
    assert memory() is None
    layer.weight.data = whole
    outputs.sum().backward()
    assert inputs.grad is not None
    assert addition.grad is not None
    assert torch.equal(inputs.grad, (torch.ones(5, 48).bfloat16() @ whole))
    assert torch.equal(addition.grad, torch.ones(5, 48).bfloat16())
