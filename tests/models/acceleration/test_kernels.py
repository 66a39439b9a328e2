"""Liger's kernels are taken where they are installed, run and know the architecture, and its losses never."""

from __future__ import annotations

import importlib.util
import sys
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch

from apprentice.errors import ModelError
from apprentice.models.acceleration.kernels import Kernels, choose_liger, has_liger, use_kernels
from apprentice.models.compat import liger_types
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.recipe import Tuning
from tests.models.architectures import made

GPU, CPU = torch.device("cuda"), torch.device("cpu")
WORDS: tuple[Kernels, ...] = ("auto", "liger", "none")


def config_of(name: str) -> Any:
    return made(name).config


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for liger-kernel 0.8.5 that has few architectures; the arguments of its calls."""
    calls: list[dict[str, Any]] = []
    module: Any = ModuleType("liger_kernel.transformers.monkey_patch")
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None, "gemma2": None, "mixtral": None}
    module._apply_liger_kernel_to_instance = lambda **arguments: calls.append(arguments)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.mark.usefixtures("liger")
def test_choices_with_the_package() -> None:
    assert [choose_liger(word, GPU, config_of("llama")) for word in WORDS] == [True, True, False]
    assert not choose_liger("auto", CPU, config_of("llama"))
    with pytest.raises(ModelError, match=r"kernels liger needs a GPU, and training runs on CPUs; use auto\."):
        choose_liger("liger", CPU, config_of("llama"))


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("name", ["gpt2", "t5", "qwen3", "mixtral"])
def test_architectures_that_the_package_lacks_or_does_otherwise(name: str) -> None:
    """The stand-in has no qwen3; Mixtral's experts are replaced in a way that LoRA on experts does not survive."""
    assert not choose_liger("auto", GPU, config_of(name))
    with pytest.raises(ModelError, match=f"kernels liger has no kernels that are known to fit {name}; use auto"):
        choose_liger("liger", GPU, config_of(name))


@pytest.mark.usefixtures("liger")
def test_an_activation_that_the_kernel_does_not_compute() -> None:
    other = config_of("llama")
    other.hidden_act = "gelu"
    assert not choose_liger("auto", GPU, other)
    with pytest.raises(ModelError, match=r"kernels liger has another activation than this llama model; use auto\."):
        choose_liger("liger", GPU, other)


@pytest.mark.usefixtures("liger")
def test_gemmas_files_name_their_activation_twice() -> None:
    gemma = config_of("gemma2")
    gemma.hidden_act = "gelu_pytorch_tanh"
    assert choose_liger("auto", GPU, gemma)


def test_choices_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert liger_types() == frozenset()
    assert not choose_liger("auto", GPU, config_of("llama"))
    missing = r"the package liger-kernel, which is not installed here; pip install 'apprentice\[liger\]', or use auto\."
    with pytest.raises(ModelError, match=missing):
        choose_liger("liger", GPU, config_of("llama"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_layers_are_given_them_and_the_loss_is_not(liger: list[dict[str, Any]], method: str) -> None:
    base = made("llama")
    model = TUNING_METHODS[method].wrap(base, Tuning.model_validate({"method": method}), 1)
    assert use_kernels(model, "auto", GPU)
    assert liger == [{"model": base, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    assert not use_kernels(model, "auto", CPU)
    assert len(liger) == 1


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which the CPU builds of PyTorch lack")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"LlamaRMSNorm", "LlamaMLP"}),
        ("mistral", {"MistralRMSNorm", "MistralMLP"}),
        ("qwen2", {"Qwen2RMSNorm", "Qwen2MLP"}),
        ("qwen3", {"Qwen3RMSNorm", "Qwen3MLP"}),
        ("gemma2", {"Gemma2RMSNorm", "Gemma2MLP"}),
        ("gemma3", {"Gemma3RMSNorm", "Gemma3MLP"}),
    ],
)
def test_the_package_replaces_norms_and_mlps(name: str, expected: set[str]) -> None:
    model = made(name)
    classes = {module: type(module).__name__ for module in model.modules()}
    forward = model.forward.__func__
    assert use_kernels(model, "liger", GPU)
    assert {kind for module, kind in classes.items() if "forward" in vars(module)} == expected
    assert model.forward.__func__ is forward


def test_a_model_with_a_kernel_of_ligers() -> None:
    """Liger binds its functions to the layers of a loaded model."""
    model = made("llama")
    assert not has_liger(model)

    def forward(self: Any, states: Any) -> Any:
        return states

    forward.__module__ = "liger_kernel.transformers.rms_norm"
    model.model.norm.forward = MethodType(forward, model.model.norm)
    assert has_liger(model)
