"""Bottleneck adapters: near the base at the start, saved and loaded alone, refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from apprentice.errors import ModelError
from apprentice.models.tuning.bottleneck import add_adapters, load_adapters, save_adapters
from tests.models.architectures import CAUSAL, SEQ2SEQ, made

IDS = torch.tensor([[5, 6, 7, 8]])


def logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS, use_cache=False, **more).logits
    return result


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_after_attention_and_feed_forward_of_every_layer(name: str, tmp_path: Path) -> None:
    model, base = made(name), logits(made(name))
    torch.manual_seed(3)
    places = add_adapters(model, 8)
    assert len(places) == 2 * (4 if name in SEQ2SEQ else 2)
    start = (logits(model) - base).abs().max() / base.abs().max()
    assert 0 < start < 0.05
    with torch.no_grad():
        for place in places:
            model.get_submodule(f"{place}.bottleneck.up").weight.normal_(std=0.5)
    assert (logits(model) - base).abs().max() > 0.05
    save_adapters(model, tmp_path, "some/base")
    again = made(name)
    load_adapters(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert json.loads((tmp_path / "adapter.json").read_text())["base"] == "some/base"


def test_adapters_of_another_model(tmp_path: Path) -> None:
    model = made("llama")
    add_adapters(model, 8)
    save_adapters(model, tmp_path, "a/llama")
    with pytest.raises(ModelError, match="belong to another architecture; use them with a/llama"):
        load_adapters(made("gpt2"), tmp_path)


def test_nothing_to_follow() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = made("llama").config
            self.core = nn.Linear(2, 2)

    with pytest.raises(ModelError, match="has no self-attention that an adapter could follow"):
        add_adapters(Strange(), 8)
