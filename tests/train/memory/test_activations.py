"""The count without memory against what autograd really keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apprentice.models.loading import load_model
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.recipe import Recipe, load_recipe
from apprentice.train.batch import SupervisedBatch
from apprentice.train.losses.sft import SupervisedLoss
from apprentice.train.memory.activations import LOGIT_BYTES, estimate_activations
from apprentice.train.memory.measure import estimate_peak_memory, out_of_memory_error
from tests.models.architectures import made
from tests.support.recipes import tiny_recipe

ROWS, LENGTH, VOCABULARY = 2, 96, 500


def recipe(folder: Path, name: str, method: str = "full", **more: Any) -> Recipe:
    """For the architecture `name`, whose tiny model is saved in `folder`."""
    model = folder / name
    if not model.exists():
        made(name).save_pretrained(model)
    return load_recipe(tiny_recipe(folder, model, tuning={"method": method, "rank": 4, "width": 8}, **more))


def kept(made: Recipe, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of one real pass over rows with one target, packed where the method packs."""
    model = TUNING_METHODS[made.tuning.method].wrap(load_model(made.model.base, dtype), made.tuning, 0).train()
    model.to(dtype)  # which DeepSpeed does
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    packed = made.tuning.method not in ("prefix", "prompt")
    positions = torch.arange(LENGTH).remainder(32).expand(ROWS, LENGTH).contiguous() if packed else None
    targets = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    targets[0, 5] = True
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        SupervisedLoss(model)(SupervisedBatch(torch.randint(3, VOCABULARY, (ROWS, LENGTH)), positions, targets))
    return sum(storage.nbytes() for storage in storages.values())


def estimate(made: Recipe, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> float | None:
    """Without what a backward pass needs beside it."""
    with monkeypatch.context() as patch:
        patch.setattr("apprentice.train.memory.activations.WORKING_TENSORS", 0)
        return estimate_activations(made, dtype, ROWS, LENGTH, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["full", "lora", "adapter", "prefix", "prompt"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox"])
def test_what_is_kept(name: str, method: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe(tmp_path, name, method)
    assert estimate(chosen, dtype, monkeypatch) == pytest.approx(kept(chosen, dtype), rel=0.1)


def test_what_dora_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe(tmp_path, "llama", "lora")
    chosen = chosen.model_copy(update={"tuning": chosen.tuning.model_copy(update={"dora": True})})
    assert estimate(chosen, torch.float32, monkeypatch) == pytest.approx(kept(chosen, torch.float32), rel=0.1)


def test_rows_logits_and_checkpointing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = recipe(tmp_path, "llama")
    one = estimate_activations(plain, torch.float32, 1, LENGTH, 1)
    assert estimate_activations(plain, torch.float32, 4, LENGTH, 1) == pytest.approx(4 * one, rel=0.05)
    logits = estimate_activations(plain, torch.float32, 1, LENGTH) - one
    assert 0 < logits <= LENGTH * VOCABULARY * LOGIT_BYTES
    monkeypatch.setattr("apprentice.train.memory.activations.CHUNK_NUMBERS", 8 * VOCABULARY)
    in_chunks = estimate_activations(plain, torch.float32, 1, LENGTH)
    assert in_chunks == estimate_activations(plain, torch.float32, 1, LENGTH, 8) < logits + one
    less = recipe(tmp_path, "llama", training__activation_checkpointing=True)
    half = estimate(less, torch.float32, monkeypatch)
    whole = estimate(plain, torch.float32, monkeypatch)
    layers, inputs = 2, ROWS * LENGTH * 64 * 4
    assert half == pytest.approx(whole / layers + layers * inputs, rel=0.02)
    every_second = recipe(tmp_path, "llama", training__activation_checkpointing="selective")
    assert estimate(every_second, torch.float32, monkeypatch) == pytest.approx(whole / 2 + whole / layers + inputs, rel=0.02)
    on_host = recipe(tmp_path, "llama", training__activation_checkpointing="offload")
    assert estimate(on_host, torch.float32, monkeypatch) == pytest.approx(whole / layers + 2 * inputs, rel=0.02)


def test_encoder_decoders(tmp_path: Path) -> None:
    assert estimate_activations(recipe(tmp_path, "t5"), torch.float32, ROWS, LENGTH, 1) > 2 * ROWS * LENGTH * 64 * 4


def test_what_nobody_knows_is_not_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = recipe(tmp_path, "llama")

    def fails(error: type[Exception]) -> Any:
        def kept(*_: Any) -> Any:
            raise error("no numbers")

        return kept

    for error, warnings in ((NotImplementedError, 0), (TypeError, 1), (AttributeError, 2)):
        monkeypatch.setattr("apprentice.train.memory.activations._saved_by_forward", fails(error))
        assert estimate_activations(made, torch.float32, ROWS, LENGTH) is None
        assert len(caplog.records) == warnings
        assert all(record.exc_info for record in caplog.records)
    state = estimate_peak_memory(made, 2**30, 2**30, torch.float32, workers=1, micro=1, length=LENGTH)
    assert state.activations is None
    assert state.total > 4 * 2**30
    assert "and activations an unknown rest." in str(out_of_memory_error(state, 1, LENGTH, "", []))
