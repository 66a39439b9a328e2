"""Attention is chosen by device, number format, architecture and purpose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from apprentice.errors import ModelError
from apprentice.models import compat
from apprentice.models.attention import backend_choice, varlen
from apprentice.models.attention.backend_choice import PackedCompute, choose_attention, has_masks, is_flat
from apprentice.models.loading import load_model
from tests.models.architectures import CAUSAL, MIXING, SEQ2SEQ, made

BF16, FP32 = torch.bfloat16, torch.float32
AMPERE, HOPPER, BLACKWELL = (PackedCompute("cuda", BF16, capability) for capability in ((8, 0), (9, 0), (10, 0)))
CPU = PackedCompute("cpu", BF16)


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the versions of flash attention that are installed, and whether `kernels` is; at first nothing is."""

    def install(*versions: int, kernels: bool = False) -> None:
        monkeypatch.setattr(compat, "installed_flash_attention", lambda: frozenset(versions))
        monkeypatch.setattr(compat, "has_hub_kernels", lambda: kernels)

    install()
    return install


def chosen(name: str, packed: PackedCompute | None = AMPERE, word: str = "auto", **changes: Any) -> str | None:
    model = made(name)
    for key, value in changes.items():
        setattr(model.config, key, value)
    return choose_attention(word, packed, model.config, type(model))


def test_words(packages: Any) -> None:
    for packed in (None, CPU, HOPPER):
        words = [chosen("llama", packed, word) for word in ("sdpa", "eager", "flex")]
        assert words == ["sdpa", "eager", "flex_attention"]
    for packed in (CPU, HOPPER):
        with pytest.raises(ModelError, match="flash needs a GPU and the package flash-attn"):
            chosen("llama", packed, "flash")
    packages(2)
    assert chosen("llama", AMPERE, "flash") == chosen("llama", HOPPER, "flash") == "flash_attention_2"
    with pytest.raises(ModelError, match="flash needs a GPU"):
        chosen("llama", CPU, "flash")


@pytest.mark.parametrize("versions", [(), (2,), (2, 3, 4)])
def test_other_purposes_have_the_default_and_cpus_examples_by_themselves(packages: Any, versions: tuple[int, ...]) -> None:
    packages(*versions, kernels=True)
    assert {chosen(name, None) for name in (*CAUSAL, *SEQ2SEQ)} == {None}
    assert {name: chosen(name, CPU) for name in CAUSAL} == dict.fromkeys(CAUSAL, "segments") | {"gemma2": None}  # soft caps
    assert chosen("llama", None, "flash") is None  # of a recipe whose training asks for it


def test_t5_has_its_own_on_every_device_and_other_encoder_decoders_the_default() -> None:
    expected = {"t5": "t5_segments", "t5_v1.1": "t5_segments", "mt5": "t5_segments", "bart": None}
    for packed in (CPU, HOPPER, PackedCompute("cuda", FP32, (7, 5))):
        assert {name: chosen(name, packed) for name in SEQ2SEQ} == expected
    config = AutoConfig.for_model("umt5")  # a bias for each layer
    assert choose_attention("auto", CPU, config, compat.model_class_of(AutoModelForSeq2SeqLM, config)) is None


def test_who_has_masks() -> None:
    names = ("varlen", "segments", "t5_segments", "flex_attention", "flash_attention_2")
    assert not any(map(has_masks, names))
    assert all(map(has_masks, (None, "sdpa", "eager")))


def test_packed_rows_on_a_gpu_need_no_package() -> None:
    assert {name: chosen(name) for name in CAUSAL} == dict.fromkeys(CAUSAL, "varlen") | {"gemma2": "flex_attention"}  # soft caps


@pytest.mark.parametrize("name", [*MIXING, "bart"])
def test_whatever_is_installed_these_have_the_default(packages: Any, name: str) -> None:
    packages(2, 3, 4, kernels=True)
    assert chosen(name, HOPPER) is chosen(name, CPU) is None


def test_a_type_that_loses_the_bounds_has_the_default() -> None:
    config = AutoConfig.for_model("nemotron")
    assert choose_attention("auto", HOPPER, config, compat.model_class_of(AutoModelForCausalLM, config)) is None


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("phimoe", {"sliding_window": 8}),
        ("qwen2_moe", {"sliding_window": 8, "use_sliding_window": True}),
        ("doge", {"sliding_window": 8}),
    ],
)
def test_a_window_that_is_in_the_mask_alone_is_not_lost(packages: Any, name: str, window: dict[str, Any]) -> None:
    packages(2, 3)
    config = AutoConfig.for_model(name, **window)
    model_class = compat.model_class_of(AutoModelForCausalLM, config)
    assert all(choose_attention("auto", packed, config, model_class) is None for packed in (CPU, AMPERE, HOPPER))
    with pytest.raises(ModelError, match=f"flash cannot run {name} "):
        choose_attention("flash", AMPERE, config, model_class)
    with pytest.raises(ModelError, match=f"sequence_parallel 2 cannot be used with {name}"):
        choose_attention("auto", replace(CPU, sequence_parallel=2), config, model_class)


@pytest.mark.parametrize("name", ["flint", "granite_swa", "granitemoe_swa", "mimo_v2_flash"])
def test_attention_sinks_are_not_lost(packages: Any, name: str) -> None:
    config = AutoConfig.for_model(name)
    for versions in ((), (2, 3)):
        packages(*versions)
        for packed in (CPU, AMPERE, HOPPER):
            assert choose_attention("auto", packed, config, compat.model_class_of(AutoModelForCausalLM, config)) is None


@pytest.mark.parametrize("name", ["gptj", "gpt_neo"])
def test_flash_is_refused_to_types_that_do_not_hear_where_examples_begin(packages: Any, name: str) -> None:
    packages(2)
    config = AutoConfig.for_model(name)
    with pytest.raises(ModelError, match=rf"flash cannot run {name} in bfloat16 on this GPU; use auto"):
        choose_attention("flash", AMPERE, config, compat.model_class_of(AutoModelForCausalLM, config))


def test_flash_attention_is_refused_to_t5(packages: Any) -> None:
    packages(2)
    with pytest.raises(ModelError, match=r"flash cannot run t5 in bfloat16 on this GPU; use auto"):
        chosen("t5", AMPERE, "flash")


def test_old_gpus_wide_numbers_and_large_heads_have_masks(packages: Any) -> None:
    packages(2, 3, 4)
    assert chosen("llama", PackedCompute("cuda", BF16, (7, 5))) is None
    assert chosen("llama", PackedCompute("cuda", FP32, (9, 0))) is None
    assert chosen("llama", PackedCompute("cuda", torch.float16, (8, 0))) == "varlen"
    assert chosen("qwen3", HOPPER, head_dim=512) is None
    with pytest.raises(ModelError, match="cannot run llama in float32"):
        chosen("llama", PackedCompute("cuda", FP32, (9, 0)), "flash")


@pytest.mark.parametrize(
    ("packed", "versions", "expected"),
    [
        (AMPERE, (2, 3, 4), "varlen"),
        (HOPPER, (2, 3, 4), "flash_attention_3"),
        (HOPPER, (2, 4), "varlen"),
        (BLACKWELL, (2, 3, 4), "flash_attention_4"),
        (BLACKWELL, (2, 3), "varlen"),
    ],
)
def test_packages_are_taken_for_the_gpus_they_were_made_for(
    packages: Any, packed: PackedCompute, versions: tuple[int, ...], expected: str
) -> None:
    packages(*versions)
    assert chosen("llama", packed) == expected


def test_soft_caps_and_dropout_are_not_lost(packages: Any) -> None:
    assert chosen("llama", attention_dropout=0.1) is None
    assert chosen("gpt2", attn_pdrop=0.1) is None
    packages(2, 3)
    assert chosen("gemma2", AMPERE) == "flash_attention_2"
    assert chosen("gemma2", HOPPER) == "flash_attention_3"
    assert chosen("gemma2", BLACKWELL) == "flash_attention_2"
    assert chosen("llama", HOPPER, attention_dropout=0.1) == "flash_attention_2"  # version 3 has none
    packages(3)
    with pytest.raises(ModelError, match="no installed package does what llama needs"):
        chosen("llama", AMPERE, "flash")


def test_kernels_of_the_hub_are_fetched_only_where_flash_is_asked_for(packages: Any) -> None:
    packages(kernels=True)
    assert chosen("llama", HOPPER) == "varlen"
    assert chosen("llama", AMPERE, "flash") == "flash_attention_2"
    assert chosen("llama", HOPPER, "flash") == "flash_attention_3"
    packages(2, kernels=True)
    assert chosen("llama", HOPPER, "flash") == "flash_attention_2"


def test_without_varlen_the_package_or_masks(packages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", None)
    assert chosen("llama") is None
    assert chosen("gemma2") == "flex_attention"
    packages(2)
    assert chosen("llama") == "flash_attention_2"


def test_a_model_that_brings_its_own_class_has_the_default(packages: Any) -> None:
    packages(2, 3)
    assert choose_attention("auto", HOPPER, made("llama").config, None) is None


def test_flat_names() -> None:
    assert all(map(is_flat, ("varlen", "segments", "flash_attention_2", "flash_attention_4", "kernels-community/vllm-flash-attn3")))
    assert not any(map(is_flat, ("sdpa", "eager", "flex_attention")))


def test_where_packed_rows_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert PackedCompute.on(torch.device("cuda", 0), BF16) == HOPPER
    assert PackedCompute.on(torch.device("cpu"), BF16) == CPU


def test_the_chosen_attention_is_the_loaded_models(tiny_model: Path) -> None:
    assert load_model(tiny_model, BF16, packed=HOPPER).config._attn_implementation == "varlen"
    assert load_model(tiny_model, BF16, packed=HOPPER, head=0).config._attn_implementation == "varlen"
    assert load_model(tiny_model, BF16, packed=CPU).config._attn_implementation == "segments"


def test_a_model_for_other_work_loads_where_flash_attention_is_installed(
    tiny_model: Path, packages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    packages(2)
    assert load_model(tiny_model, FP32).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5"])
def test_transformers_says_what_a_class_supports(name: str) -> None:
    config = made(name).config
    loader = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    model_class = compat.model_class_of(loader, config)
    assert model_class is type(made(name))
    assert compat.attention_support(model_class) == (name != "t5", True, name != "gemma2", name != "t5")
    assert compat.attention_support(None) == (False, False, False, False)
    assert compat.model_class_of(loader, AutoConfig.for_model("clip")) is None
    assert backend_choice.FLEX == "flex_attention"
