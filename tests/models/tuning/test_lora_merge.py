"""Merging of LoRA in 16 bits: changes below half a step of bfloat16 survive on average."""

from typing import Any

import pytest
import torch

from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.recipe import Tuning
from tests.models.architectures import made

LORA = TUNING_METHODS["lora"]


def tuned_model(dtype: torch.dtype) -> Any:
    """A Llama whose weights lie on bfloat16's grid, with LoRA changes of about a tenth of a step."""
    torch.manual_seed(0)
    model = LORA.wrap(made("llama").to(torch.bfloat16).to(dtype), Tuning(method="lora", rank=4), 3)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 5e-5).to(dtype)
    return model


def adapted(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in model.state_dict().items() if "_proj.weight" in name}


def kept_share(merged: dict[str, torch.Tensor]) -> float:
    """Part of the changes that is in the merged weights: 1 where, on average, all of it is."""
    torch.manual_seed(0)
    base = adapted(made("llama").to(torch.bfloat16))
    exact = adapted(LORA.merge(tuned_model(torch.float32)))  # type: ignore[misc]
    changes = {name: exact[name] - base[name] for name in base}
    assert all(bool(change.any()) for change in changes.values())
    over = sum(float(((merged[name] - base[name]) * change).sum()) for name, change in changes.items())
    return over / sum(float(change.pow(2).sum()) for change in changes.values())


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_what_was_learned_survives_a_merge_into_sixteen_bits(own: torch.dtype) -> None:
    assert LORA.merge is not None
    merged = adapted(LORA.merge(tuned_model(own), torch.bfloat16))
    assert kept_share(merged) == pytest.approx(1.0, abs=0.1)
    nearest = adapted(tuned_model(torch.bfloat16).merge_and_unload())
    assert kept_share(nearest) < 0.7  # which is what this is about


def test_a_merge_in_float32_is_that_of_peft() -> None:
    assert LORA.merge is not None
    merged, by_peft = adapted(LORA.merge(tuned_model(torch.float32))), adapted(tuned_model(torch.float32).merge_and_unload())
    assert all(torch.equal(merged[name], by_peft[name]) for name in by_peft)
