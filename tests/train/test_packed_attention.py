"""The attention of packed rows in a model that does other work too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apprentice.models import compat
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.recipe import Tuning
from apprentice.train.losses.target_losses import TargetLosses
from apprentice.train.packed_attention import packed_attention
from tests.models.architectures import made

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compat, "installed_flash_attention", frozenset)


def within(model: Any, word: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    before = model.config._attn_implementation
    with packed_attention(model, word, device, dtype):
        name = model.config._attn_implementation
        assert TargetLosses(model)._is_flat is (name in ("varlen", "segments"))
    assert model.config._attn_implementation == before
    return str(name)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_is_changed_on_a_gpu_and_changed_back(method: str) -> None:
    model = TUNING_METHODS[method].wrap(made("llama"), Tuning.model_validate({"method": method}), 1)
    assert within(model, "auto", GPU) == within(model, "flash", GPU) == "varlen"
    assert within(model, "eager", GPU) == "eager"
    assert within(model, "auto", GPU, torch.float32) == "sdpa"
    assert within(model, "auto", CPU) == within(model, "flash", CPU) == "segments"


def test_both_sides_of_t5_are_changed_and_changed_back() -> None:
    model = made("t5")
    sides = (model, model.encoder, model.decoder)
    for device in (GPU, CPU):
        with packed_attention(model, "auto", device, torch.float32):
            assert {side.config._attn_implementation for side in sides} == {"t5_segments"}
        assert {side.config._attn_implementation for side in sides} == {"sdpa"}


def test_virtual_tokens_keep_theirs() -> None:
    prefix = TUNING_METHODS["prefix"].wrap(made("llama"), Tuning.model_validate({"method": "prefix"}), 1)
    assert within(prefix, "auto", GPU) == "sdpa"
