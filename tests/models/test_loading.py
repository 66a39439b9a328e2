"""Loading models and choosing number formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from apprentice.errors import ModelError, RecipeError
from apprentice.models.loading import check_dtype, count_parameters, load_model, resolve_dtype
from apprentice.pretrained.architecture import family_of
from tests.models.architectures import CAUSAL, SEQ2SEQ, made


def test_named_formats() -> None:
    assert resolve_dtype("bfloat16") == torch.bfloat16
    assert resolve_dtype("float32", "cuda") == torch.float32


@pytest.mark.parametrize(
    ("unit", "expected"), [("amx_bf16", torch.bfloat16), ("avx512_bf16", torch.bfloat16), ("avx512_f", torch.float32)]
)
def test_auto_goes_by_the_hardware(monkeypatch: pytest.MonkeyPatch, unit: str, expected: torch.dtype) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, "avx512_bf16": False, unit: True})
    assert resolve_dtype("auto", "cpu") == expected
    assert resolve_dtype("auto", "cuda") == torch.bfloat16


def test_float16_is_refused_where_it_fails(tmp_path: Path) -> None:
    made("t5").save_pretrained(tmp_path / "t5")
    made("bart").save_pretrained(tmp_path / "bart")
    with pytest.raises(RecipeError, match=r"float16 overflows in t5, whose activations leave its range; use bfloat16"):
        check_dtype("float16", tmp_path / "t5", on_gpu=True)
    with pytest.raises(RecipeError, match="float16 is for GPUs"):
        check_dtype("float16", tmp_path / "bart", on_gpu=False)
    check_dtype("float16", tmp_path / "bart", on_gpu=True)
    check_dtype("bfloat16", tmp_path / "t5", on_gpu=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load(tiny_model: Path, dtype: torch.dtype, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(tiny_model, dtype, "eager")
    assert model.dtype == dtype
    assert not model.training
    assert model.config._attn_implementation == "eager"
    assert load_model(str(tiny_model), dtype).config._attn_implementation == "sdpa"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_every_architecture(name: str, tmp_path: Path) -> None:
    saved = made(name)
    saved.save_pretrained(tmp_path)
    assert family_of(tmp_path) == ("seq2seq" if name in SEQ2SEQ else "causal")
    loaded = load_model(tmp_path, torch.float32)
    assert type(loaded) is type(saved)
    weights = loaded.state_dict()
    assert weights.keys() == saved.state_dict().keys() != set()
    assert all(torch.equal(weights[key], value) for key, value in saved.state_dict().items())


def test_count(tiny_model: Path) -> None:
    model = load_model(tiny_model, torch.float32)
    assert count_parameters(tiny_model) == sum(parameter.numel() for parameter in model.parameters()) > 100_000
    assert count_parameters(tiny_model / "nowhere") == 0


def test_only_the_files_that_are_loaded_are_counted(tiny_model: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_model / "model.safetensors")
    save_file(weights, tmp_path / "consolidated.safetensors")  # the maker's own format
    save_file(weights, tmp_path / "model.safetensors")
    assert count_parameters(tmp_path) == count_parameters(tiny_model)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    places = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}  # the second one is still to come
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(places))
    assert count_parameters(tmp_path) == count_parameters(tiny_model)


@pytest.mark.parametrize(("keys", "dtype"), [({}, torch.float32), ({"torch_dtype": "float16"}, torch.float16)])
def test_pickled_weights_are_counted_by_their_size(
    tiny_model: Path, tmp_path: Path, keys: dict[str, str], dtype: torch.dtype
) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "dtype"} | keys))
    weights = {name: tensor.to(dtype) for name, tensor in load_file(tiny_model / "model.safetensors").items()}
    torch.save(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, tmp_path / "pytorch_model.bin")  # tied
    torch.save({"learning_rate": 0.1}, tmp_path / "training_args.bin")
    assert count_parameters(tmp_path) == pytest.approx(count_parameters(tiny_model), rel=0.05)


def test_not_a_causal_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load_model(tmp_path, torch.float32)


def test_not_a_sequence_to_sequence_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "is_encoder_decoder": True}))
    with pytest.raises(ModelError, match="cannot be loaded as a sequence-to-sequence model"):
        load_model(tmp_path, torch.float32)


def test_missing_weights(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights, 'model.layers.0.self_attn.q_proj.weight' among them"):
        load_model(folder, torch.float32)
