"""The engine that decodes a model: the named one, or vLLM on a GPU where it can, and the reason."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import T5Config

from apprentice.errors import ServingError
from apprentice.model_pool import engine_choice
from apprentice.model_pool.engine_choice import choose_engine, choose_pool_engine
from apprentice.recipe import Serving
from tests.support.big_models import big_llama


def t5(folder: Path) -> Path:
    """A folder with the config.json of an encoder-decoder."""
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(folder / "t5")
    return folder / "t5"


@pytest.fixture(params=[True, False])
def vllm_is_installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(engine_choice.importlib.util, "find_spec", lambda _: object() if request.param else None)
    return bool(request.param)


def test_auto_takes_vllm_on_a_gpu_where_it_is_installed(tiny_model: Path, vllm_is_installed: bool) -> None:
    choice = choose_engine(Serving(), tiny_model, on_gpu=True)
    if vllm_is_installed:
        assert str(choice) == "engine vllm: a causal model on a GPU, and vLLM is installed"
    else:
        assert str(choice) == "engine transformers: serving.engine vllm needs the package vllm, which is not installed"
    assert str(choose_engine(Serving(), tiny_model, on_gpu=False)) == "engine transformers: the model runs on CPUs"


def test_auto_takes_our_own_for_what_vllm_cannot_decode(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice.importlib.util, "find_spec", lambda _: object())
    assert choose_engine(Serving(), t5(tmp_path), on_gpu=True).name == "transformers"
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_model, tuned)
    (tuned / "adapter").mkdir()
    choice = choose_engine(Serving(), tuned, on_gpu=True)
    assert choice.name == "transformers"
    assert choice.reason.endswith("has an adapter beside its weights that cannot be merged into them, and vLLM would leave it out")


@pytest.mark.parametrize(
    ("settings", "on_gpu", "words"),
    [
        ({"tensor_parallel": 2, "engine": "transformers"}, True, "serving.engine transformers holds a model on one device"),
        ({"tensor_parallel": 3}, True, "3 does not divide the 64 attention heads of .*, which are split evenly; use 2, 4, 8, 16,"),
        ({"tensor_parallel": 8}, False, "8 asks for GPUs, and there are none here; leave it out, or set serving.engine vllm"),
    ],
)
def test_a_model_that_cannot_be_split_as_asked_is_refused(
    settings: dict[str, Any], on_gpu: bool, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_choice.importlib.util, "find_spec", lambda _: object())
    folder = big_llama(tmp_path, "70b")
    for choose in (choose_engine, choose_pool_engine):
        with pytest.raises(ServingError, match=words):
            choose(Serving(**settings), folder, on_gpu=on_gpu)
    assert str(choose_engine(Serving(tensor_parallel=8), folder, on_gpu=True)) == "engine vllm: serving.tensor_parallel 8"
    assert choose_engine(Serving(tensor_parallel=2, engine="vllm"), folder, on_gpu=False).name == "vllm"


def test_workers_go_on_with_our_own_where_the_named_engine_cannot(tmp_path: Path) -> None:
    """A recipe that is served by vLLM is evaluated by our own engine where vLLM is not."""
    with pytest.raises(ServingError, match="decodes causal models only"):
        choose_engine(Serving(engine="vllm"), t5(tmp_path), on_gpu=True)
    choice = choose_pool_engine(Serving(engine="vllm"), t5(tmp_path), on_gpu=True)
    assert choice.name == "transformers"
    assert "decodes causal models only" in choice.reason
