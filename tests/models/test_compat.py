"""Private API of transformers still decides which attention a loaded model has, whatever its folder says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from apprentice.models.compat import has_hub_kernels, installed_flash_attention, set_implementations
from tests.models.architectures import made


@pytest.mark.parametrize(("attention", "expected"), [("eager", "eager"), ("sdpa", "sdpa"), (None, "sdpa")])
def test_the_name_that_is_set_is_the_loaded_models(tmp_path: Path, attention: str | None, expected: str) -> None:
    made("llama").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    other = "eager" if expected == "sdpa" else "sdpa"
    (tmp_path / "config.json").write_text(json.dumps(content | {"_attn_implementation": other, "_experts_implementation": "eager"}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert hasattr(config, "_attn_implementation")
    assert hasattr(config, "_experts_implementation")
    set_implementations(config, attention)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert model.config._attn_implementation == expected
    assert model.model.layers[0].self_attn.config._attn_implementation == expected


def test_what_is_installed_for_flash_attention() -> None:
    assert installed_flash_attention() <= ({2, 3, 4} if torch.cuda.is_available() else set())
    assert has_hub_kernels() is (importlib.util.find_spec("kernels") is not None)
