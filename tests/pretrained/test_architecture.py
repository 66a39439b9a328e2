"""The kind of a model, from its config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apprentice.errors import ModelError
from apprentice.pretrained.architecture import can_pack, family_of


@pytest.mark.parametrize(
    ("config", "family", "packs"),
    [
        ({"model_type": "llama"}, "causal", True),
        ({"model_type": "gpt2", "is_encoder_decoder": False}, "causal", True),
        ({"model_type": "t5", "is_encoder_decoder": True}, "seq2seq", True),
        ({"model_type": "mt5", "is_encoder_decoder": True}, "seq2seq", True),
        ({"model_type": "bart", "is_encoder_decoder": True}, "seq2seq", False),
        ({"model_type": "opt"}, "causal", False),
        ({"model_type": "mamba"}, "causal", False),
        ({"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"]}, "causal", False),
        ({"model_type": "qwen3_5", "text_config": {"layer_types": ["linear_attention"]}}, "causal", False),
        ({"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}, "causal", True),
        ({"model_type": "falcon", "alibi": True}, "causal", False),
    ],
)
def test_family(tmp_path: Path, config: dict[str, object], family: str, packs: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (family_of(tmp_path), can_pack(tmp_path)) == (family, packs)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_no_model_folder(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"is not a model folder: its config.json cannot be read"):
        family_of(tmp_path)
