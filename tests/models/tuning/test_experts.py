"""LoRA on the experts of mixture-of-experts models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from apprentice.errors import RecipeError
from apprentice.models.tuning.experts import expert_parameters, modules_used_as_one
from apprentice.models.tuning.methods import TUNING_METHODS, trainable_parameters
from apprentice.recipe import Tuning
from tests.models.architectures import EXPERTS, made

LORA = TUNING_METHODS["lora"]


@pytest.mark.parametrize("name", EXPERTS)
def test_lora_trains_experts_and_is_merged_into_them(name: str) -> None:
    model = LORA.wrap(made(name), Tuning(rank=2, experts=True), 0).eval()
    trained = trainable_parameters(model)
    of_experts = [key for key in trained if ".mlp.experts." in key]
    assert len(of_experts) == 2 * 2 * 2  # layers, parameters of experts, matrices
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(0.0, 0.1)
    ids = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        plain = made(name)(input_ids=ids).logits
        assert LORA.merge is not None
        merged: Any = LORA.merge(model)
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4)
    assert (expected - plain).norm() > 0.1 * plain.norm()


def test_modules_whose_parameters_zero_must_gather_together() -> None:
    model: Any = LORA.wrap(made("mixtral"), Tuning(rank=2, experts=True), 0)
    wrappers = modules_used_as_one(model)
    matrices = [name for name, _ in model.named_parameters() if ".mlp." in name and "lora_" in name]
    inside = [name for name in matrices if any(part in wrappers for part in _parents(model, name))]
    assert inside == matrices != []
    assert modules_used_as_one(made("llama")) == []
    with_modules = torch.nn.Module()
    with_modules.block = torch.nn.Module()
    with_modules.block.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert modules_used_as_one(with_modules) == [with_modules.block]


def _parents(model: Any, name: str) -> list[Any]:
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]


def test_experts_are_refused_where_there_are_none() -> None:
    assert expert_parameters(made("llama")) == expert_parameters(made("mamba")) == []
    with pytest.raises(RecipeError, match=r"tuning.experts is for mixture-of-experts models, and llama has none; leave it out"):
        LORA.wrap(made("llama"), Tuning(experts=True), 0)
    with pytest.raises(ValidationError, match=r"tuning.method is full; use lora, or leave it out"):
        Tuning(method="full", experts=True)
    with pytest.raises(ValidationError, match=r"set tuning.dropout to 0"):
        Tuning(experts=True, dropout=0.1)
