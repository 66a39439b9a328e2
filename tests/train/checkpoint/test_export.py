"""From a checkpoint to folders that transformers and peft load alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from apprentice.data.encoding.prompt_contract import layout_beside, layout_over
from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import TrainingError
from apprentice.models.loading import load_model
from apprentice.models.tuning.methods import TUNING_METHODS, load_trainable, trainable
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.folder import Run, read_contract, weights_sha256
from apprentice.storage import Folder
from apprentice.train.checkpoint import export as exporting
from apprentice.train.checkpoint.export import export
from apprentice.train.checkpoint.format import Checkpoint, save
from apprentice.train.state import State

IDS = torch.tensor([[5, 6, 7, 8]])


def recipe(model: Path, method: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "exported",
            "seed": 4,
            "model": {"base": str(model)},
            "data": {"tasks": ["t"]},
            "tuning": {"method": method, "rank": 4, "virtual_tokens": 4, "width": 8},
            "training": {"steps": 3},
        }
    )


def trained(folder: Path, made: Recipe, dtype: str) -> tuple[Run, Checkpoint, Any]:
    """A checkpoint with weights that are not those of the base, and the model that has them."""
    method = TUNING_METHODS[made.tuning.method]
    model: Any = method.wrap(load_model(made.model.base, torch.float32), made.tuning, made.seed).eval()
    generator = torch.Generator().manual_seed(5)
    weights = {name: p.detach() + 0.05 * torch.randn(p.shape, generator=generator) for name, p in trainable(model).items()}
    load_trainable(model, weights)
    run = Run(Folder.at(folder / "run"))
    tensors = ((f"weight/{name}", value) for name, value in weights.items())
    return run, save(run.checkpoints, tensors, State(step=3), {"dtype": dtype}), model


def layout_of(model: Path) -> Layout:
    return Layout("chat", Tokenizer(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 on transformers 5.23
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prefix", "prompt", "adapter"])
def test_export(tiny_model: Path, tmp_path: Path, method: str) -> None:
    made = recipe(tiny_model, method)
    run, checkpoint, model = trained(tmp_path, made, "float32")
    export(made, run, checkpoint, layout_of(tiny_model))
    assert run.is_trained
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        base = load_model(tiny_model, torch.float32)(input_ids=IDS).logits
        alone = load_model(run.model.local, torch.float32)(input_ids=IDS).logits
        plain = AutoModelForCausalLM.from_pretrained(run.model.local)(input_ids=IDS).logits  # with transformers alone
    assert (expected[:, -4:] - base).abs().max() > 0.01
    torch.testing.assert_close(plain, expected if TUNING_METHODS[method].merge else base, rtol=0, atol=1e-4)
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-4)
    contract = read_contract(run.model.local)
    assert contract is not None
    assert (contract.run, contract.layout, contract.base) == ("exported", "chat", str(tiny_model))
    assert layout_beside(run.model.local).encode_prompt("a") == layout_of(tiny_model).encode_prompt("a")
    assert run.adapter.exists() == (method != "full")
    if method != "full":
        words = read_contract(run.adapter)
        assert words is not None
        assert (words.base_sha256, words.weights_sha256) == (weights_sha256(tiny_model), weights_sha256(run.adapter.local))
        assert layout_over("exported", run.adapter.local, layout_of(tiny_model), weights_sha256(tiny_model)).name == "chat"
    if method in ("lora", "prefix", "prompt"):
        with_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run.adapter.local)
        with torch.no_grad():
            torch.testing.assert_close(with_peft(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    assert sorted(child.name for child in run.folder.children() if child.name.startswith(".")) == []


def test_bfloat16_runs_are_saved_in_bfloat16(tiny_model: Path, tmp_path: Path) -> None:
    made = recipe(tiny_model, "lora")
    run, checkpoint, model = trained(tmp_path, made, "bfloat16")
    export(made, run, checkpoint, layout_of(tiny_model))
    alone = AutoModelForCausalLM.from_pretrained(run.model.local)
    assert alone.dtype == torch.bfloat16
    merge = TUNING_METHODS["lora"].merge
    assert merge is not None
    merged = merge(model).state_dict()
    assert all(torch.equal(tensor, merged[name].bfloat16()) for name, tensor in alone.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_loses_the_adapter_is_not_published(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    made = recipe(tiny_model, "lora")
    run, checkpoint, _ = trained(tmp_path, made, dtype)
    forgetful = replace(TUNING_METHODS["lora"], merge=lambda model: load_model(tiny_model, torch.float32))
    monkeypatch.setitem(TUNING_METHODS, "lora", forgetful)
    with pytest.raises(TrainingError, match=r"log-probabilities are .* from the trained model's; do not use it"):
        export(made, run, checkpoint, layout_of(tiny_model))
    assert not run.model.exists()


def test_what_does_not_load_again_is_not_published(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tiny_model, "full")
    run, checkpoint, _ = trained(tmp_path, made, "float32")

    def loads_something_else(base: Any, dtype: torch.dtype, attention: str = "auto", **_: Any) -> Any:
        return load_model(tiny_model, dtype)

    monkeypatch.setattr(exporting, "load_model", loads_something_else)
    with pytest.raises(TrainingError, match="is not the same in the exported model"):
        export(made, run, checkpoint, layout_of(tiny_model))
    assert not run.model.exists()
