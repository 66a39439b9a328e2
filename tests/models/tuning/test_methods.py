"""What each tuning method trains, saves and gives back."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from apprentice.errors import ModelError, RecipeError
from apprentice.models.loading import load_model
from apprentice.models.tuning.methods import TUNING_METHODS, check_tuning, count_trainable, load_trainable, trainable_parameters
from apprentice.recipe import Tuning
from tests.models.architectures import SEQ2SEQ, made

IDS = torch.tensor([[5, 6, 7, 8]])


def wrapped(folder: Path, method: str, seed: int = 1, **values: Any) -> Any:
    tuning = Tuning.model_validate({"method": method, "rank": 4} | values)
    return TUNING_METHODS[method].wrap(load_model(folder, torch.float32), tuning, seed).eval()


def disturbed(model: Any) -> dict[str, torch.Tensor]:
    """Weights as training might have left them."""
    generator = torch.Generator().manual_seed(5)
    return {name: p.detach() + 0.05 * torch.randn(p.shape, generator=generator) for name, p in trainable_parameters(model).items()}


def test_full_trains_everything(tiny_model: Path) -> None:
    model = wrapped(tiny_model, "full")
    assert trainable_parameters(model).keys() == dict(model.named_parameters()).keys()
    assert TUNING_METHODS["full"].save_adapter is None
    merge = TUNING_METHODS["full"].merge
    assert merge is not None
    assert merge(model) is model
    assert count_trainable(model) == (sum(p.numel() for p in model.parameters()), 1.0)


def test_lora_trains_two_small_matrices_of_every_linear_layer(tiny_model: Path) -> None:
    model = wrapped(tiny_model, "lora")
    names = trainable_parameters(model)
    assert len(names) == 2 * 2 * 7  # layers, matrices, projections
    assert all("lora_" in name for name in names)
    assert all(4 in parameter.shape for parameter in names.values())


def test_lora_begins_the_same_everywhere(tiny_model: Path) -> None:
    first, again, other = (trainable_parameters(wrapped(tiny_model, "lora", seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (6.0, 1.5)])
def test_alpha(tiny_model: Path, alpha: float | None, scale: float) -> None:
    model = wrapped(tiny_model, "lora", alpha=alpha)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == scale


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(4, None, 8.0), (64, None, 2.0), (4, 6.0, 3.0)])
def test_the_scale_of_rslora_falls_with_the_root_of_the_rank(
    tiny_model: Path, rank: int, alpha: float | None, scale: float
) -> None:
    model = wrapped(tiny_model, "lora", rank=rank, alpha=alpha, rslora=True)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == scale


def test_dora_trains_the_length_of_every_row_of_a_weight_too(tiny_model: Path) -> None:
    model = wrapped(tiny_model, "lora", dora=True)
    lengths = {name: values for name, values in trainable_parameters(model).items() if "lora_magnitude_vector" in name}
    assert len(lengths) == 2 * 7  # layers, projections
    name, values = next(iter(lengths.items()))
    weight = model.get_submodule(name.partition(".lora_magnitude_vector")[0]).base_layer.weight
    torch.testing.assert_close(values.detach(), weight.norm(dim=1), rtol=1e-5, atol=0)
    with torch.no_grad():  # it begins as the base
        torch.testing.assert_close(
            model(input_ids=IDS).logits, load_model(tiny_model, torch.float32)(input_ids=IDS).logits, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 on transformers 5.23
def test_lora_loads_with_peft_alone_and_merges_to_the_same_logits(
    variant: dict[str, bool], tiny_model: Path, tmp_path: Path
) -> None:
    model = wrapped(tiny_model, "lora", **variant)
    load_trainable(model, disturbed(model))
    method = TUNING_METHODS["lora"]
    assert method.save_adapter is not None
    assert method.merge is not None
    method.save_adapter(model, tmp_path / "adapter", "some/base")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        untuned = load_model(tiny_model, torch.float32)(input_ids=IDS).logits
        with_peft = PeftModel.from_pretrained(load_model(tiny_model, torch.float32), tmp_path / "adapter")
        loaded = with_peft(input_ids=IDS).logits
        merged = method.merge(model)(input_ids=IDS).logits
    assert (expected - untuned).abs().max() > 0.1
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    assert with_peft.peft_config["default"].base_model_name_or_path == "some/base"
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 on transformers 5.23
@pytest.mark.parametrize("method", ["prefix", "prompt", "adapter"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_what_cannot_be_merged_loads_from_beside_the_weights(name: str, method: str, tmp_path: Path) -> None:
    base = made(name)
    base.save_pretrained(tmp_path)
    model = wrapped(tmp_path, method, virtual_tokens=4, width=8)
    load_trainable(model, disturbed(model))
    chosen = TUNING_METHODS[method]
    assert chosen.merge is None
    assert chosen.save_adapter is not None
    chosen.save_adapter(model, tmp_path / "adapter", "some/base")
    more = {"decoder_input_ids": IDS} if name in SEQ2SEQ else {}
    with torch.no_grad():
        outputs = [
            each(input_ids=IDS, use_cache=False, **more).logits for each in (base, model, load_model(tmp_path, torch.float32))
        ]
    assert (outputs[1][:, -4:] - outputs[0]).abs().max() > 1e-3
    torch.testing.assert_close(outputs[2], outputs[1], rtol=0, atol=1e-5)
    numbers, share = count_trainable(model)
    assert 0 < numbers < 50_000
    assert 0 < share < 0.2


@pytest.mark.parametrize("is_installed", [False, True])
def test_four_bits_need_bitsandbytes(is_installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("bitsandbytes", None) if is_installed else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with nullcontext() if is_installed else pytest.raises(RecipeError, match=r"bitsandbytes, which is not installed; .*use lora"):
        check_tuning(Tuning(method="qlora"))
    check_tuning(Tuning(method="lora"))


def test_other_weights_are_refused(tiny_model: Path) -> None:
    model = wrapped(tiny_model, "lora")
    weights = disturbed(model)
    first = min(weights)
    with pytest.raises(ModelError, match="is in only one of them"):
        load_trainable(model, {name: value for name, value in weights.items() if name != first})
    with pytest.raises(ModelError, match=r"\(3,\) is not"):
        load_trainable(model, weights | {first: torch.zeros(3)})
