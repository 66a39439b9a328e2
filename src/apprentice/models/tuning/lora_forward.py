"""LoRA's forward pass in 16-bit formats: base product and addition become one number before they are rounded.

peft rounds the base's product, adds what the adapter adds, and rounds again. Between two numbers of the format lies 1/256 of their
size, and additions of less than half of that vanish, everywhere alike: the model computes as if it had learned less than it has.

    base 1.0000 (rounded) + addition 0.0030 → 1.0000      peft: the addition is lost
    base 1.0021 (exact)   + addition 0.0030 → 1.0078      here: `addmm` adds before it rounds, and errors cancel over many outputs
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

_NARROW = (torch.bfloat16, torch.float16)


class _AddProduct(torch.autograd.Function):
    """`addition` + `inputs` · `weight`ᵀ, rounded once; (rows, outputs), (rows, inputs), and a frozen (outputs, inputs).

    It keeps the parameter itself for the backward pass, and no view of it: under ZeRO-3 a whole weight lives while its layer is
    computed, and a view would hold all of them until the end of the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, addition: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.addmm(addition, inputs, weight.t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        return gradient, gradient @ weight if ctx.needs_input_grad[1] else None, None


class AddingLinear(nn.Linear):
    """Linear layer with a frozen weight that takes an addition to its outputs."""

    def forward(self, inputs: Tensor, addition: Tensor | None = None) -> Tensor:
        """Maps (…, inputs) to (…, outputs), plus `addition` of that shape, which is added before the product is rounded.

        In 16 bits a bias is added behind, with and without an addition, so that an addition of zeros changes no bit.
        """
        if addition is None:
            if self.bias is None or self.weight.dtype not in _NARROW:
                return super().forward(inputs)
            return nn.functional.linear(inputs, self.weight) + self.bias
        flat = addition.reshape(-1, self.out_features), inputs.reshape(-1, self.in_features)
        outputs: Tensor = _AddProduct.apply(*flat, self.weight)  # type: ignore[no-untyped-call]
        outputs = outputs if self.bias is None else outputs + self.bias
        return outputs.view(*inputs.shape[:-1], self.out_features)


def add_before_rounding(model: nn.Module) -> None:
    """Makes the plain LoRA layers over linear layers of `model` add before they round; layers of DoRA, experts and 4 bits stay.

    In float32 they compute as peft does, bit by bit.
    """
    from peft.tuners.lora.layer import Linear

    for layer in list(model.modules()):
        if type(layer) is Linear and type(layer.base_layer) is nn.Linear and not layer.lora_variant:
            layer.__class__ = _adding_lora_class()
            layer.base_layer.__class__ = AddingLinear


def restore_base_layer(layer: Any) -> None:
    """Makes the linear layer under `layer`, one of peft's, a plain one again, which is what it is once the adapter is merged."""
    base: Any = layer.get_base_layer()
    if type(base) is AddingLinear:
        base.__class__ = cast("type[AddingLinear]", nn.Linear)


def _is_autocast(device_type: str) -> bool:
    """Whether products on such devices change their number format; the meta device's never do."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


@cache
def _adding_lora_class() -> Any:
    """The class of LoRA layers whose base layer is an `AddingLinear`; peft takes seconds to import, so it is made when needed."""
    from peft.tuners.lora.layer import Linear

    class AddingLoraLinear(Linear):
        """LoRA layer that passes what it adds to its base layer."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """As peft's, with one rounding where the base layer computes in 16 bits."""
            base: Any = self.base_layer
            is_plain = not (args or kwargs or self.disable_adapters or self.merged or _is_autocast(x.device.type))
            active = [name for name in self.active_adapters if name in self.lora_A]
            is_narrow = x.dtype in _NARROW and base.weight.dtype == x.dtype and not base.weight.requires_grad
            if not is_plain or len(active) != 1 or self.lora_variant or not is_narrow:
                plain: Tensor = super().forward(x, *args, **kwargs)
                return plain
            (name,) = active
            down, up = cast("nn.Linear", self.lora_A[name]), cast("nn.Linear", self.lora_B[name])
            addition = up(down(self.lora_dropout[name](x.to(down.weight.dtype)))) * self.scaling[name]
            outputs: Tensor = base(x, addition.to(x.dtype))
            return outputs

    return AddingLoraLinear
