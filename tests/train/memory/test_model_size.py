"""A model's size from its config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from apprentice.errors import ModelError
from apprentice.models.loading import load_model
from apprentice.models.tuning.methods import TUNING_METHODS, count_trainable
from apprentice.recipe import Recipe, load_recipe
from apprentice.train.memory.model_size import measure_model_size
from tests.models.architectures import CAUSAL, EXPERTS, MIXING, SEQ2SEQ, made
from tests.support.big_models import big_llama
from tests.support.recipes import tiny_recipe


def recipe(folder: Path, model: Path, method: str = "full", **more: Any) -> Recipe:
    return load_recipe(tiny_recipe(folder, model, tuning={"method": method, "rank": 4}, **more))


@pytest.mark.parametrize("method", ["full", "lora", "adapter", "prompt"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_counts_what_the_loaded_model_has(name: str, method: str, tmp_path: Path) -> None:
    made(name).save_pretrained(tmp_path / name)
    chosen = recipe(tmp_path, tmp_path / name, method)
    model = TUNING_METHODS[method].wrap(load_model(chosen.model.base, torch.float32), chosen.tuning, 0)
    size = measure_model_size(chosen, torch.float32)
    assert size.trained == count_trainable(model)[0]
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", [*CAUSAL, *MIXING, *EXPERTS, *SEQ2SEQ])
def test_models_of_every_architecture_have_a_size(name: str, tmp_path: Path) -> None:
    """Those without attention too: training on a GPU measures them for MFU."""
    made(name).config.save_pretrained(tmp_path / name)
    size = measure_model_size(recipe(tmp_path, tmp_path / name, training__resources={"gpus": 1}), torch.bfloat16)
    assert size.products.weights > 0
    assert (size.attention_width == 0) == (name == "mamba")


def test_products_leave_out_embeddings_that_are_looked_up(tmp_path: Path) -> None:
    size = measure_model_size(recipe(tmp_path, big_llama(tmp_path, "8b")), torch.bfloat16)
    assert size.parameters == size.trained == 8_030_261_248
    norms, embedding = 65 * 4096, 128256 * 4096
    assert size.products.weights == size.products.trained == size.parameters - norms - embedding
    assert (size.layers, size.attention_width, size.weight_bytes, size.is_16_bit) == (32, 4096, 2, True)
    tied = measure_model_size(recipe(tmp_path, big_llama(tmp_path, "1b")), torch.bfloat16)
    assert tied.products.weights == tied.parameters - 33 * 2048  # the output layer multiplies with the embedding


def test_lengths_of_dora_are_counted(tmp_path: Path) -> None:
    model = big_llama(tmp_path, "8b")
    lora, dora = (
        measure_model_size(load_recipe(tiny_recipe(tmp_path, model, tuning={"method": "lora", "dora": dora})), torch.bfloat16)
        for dora in (False, True)
    )
    rows = 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096)  # layers, rows of each linear layer's weight
    assert dora.trained - lora.trained == dora.parameters - lora.parameters == rows


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_token_meets_the_experts_that_it_is_sent_to(method: str, tmp_path: Path) -> None:
    """Two of four; LoRA's matrices beside experts are divided likewise."""
    made("qwen2_moe").save_pretrained(tmp_path / "moe")
    chosen = load_recipe(tiny_recipe(tmp_path, tmp_path / "moe", tuning={"method": method, "experts": method == "lora"}))
    size = measure_model_size(chosen, torch.float32)
    model = TUNING_METHODS[method].wrap(load_model(chosen.model.base, torch.float32), chosen.tuning, 0)
    of_experts = {name: parameter for name, parameter in model.named_parameters() if ".experts." in name}
    assert len(of_experts) == {"full": 4, "lora": 12}[method]
    idle = sum(parameter.numel() for parameter in of_experts.values()) / 2
    idle_trained = sum(parameter.numel() for parameter in of_experts.values() if parameter.requires_grad) / 2
    assert size.active.weights == size.parameters - idle
    assert size.active.trained == size.trained - idle_trained > 0
    dense = measure_model_size(recipe(tmp_path, big_llama(tmp_path, "1b")), torch.bfloat16)
    assert (dense.active.weights, dense.active.trained) == (dense.parameters, dense.trained)


@pytest.mark.parametrize(
    ("name", "word", "dtype", "gpus", "is_masked"),
    [
        ("llama", "auto", torch.bfloat16, 1, False),
        ("llama", "auto", torch.bfloat16, 0, False),
        ("llama", "sdpa", torch.bfloat16, 0, True),
        ("llama", "auto", torch.float32, 1, True),
        ("llama", "flash", torch.bfloat16, 1, False),
        ("llama", "flex", torch.bfloat16, 1, False),
        ("llama", "sdpa", torch.bfloat16, 1, True),
        ("t5", "auto", torch.bfloat16, 1, False),
        ("t5", "sdpa", torch.bfloat16, 1, True),
    ],
)
def test_attention_is_the_one_that_training_chooses(
    name: str, word: str, dtype: torch.dtype, gpus: int, is_masked: bool, tmp_path: Path
) -> None:
    made(name).save_pretrained(tmp_path / name)
    chosen = recipe(tmp_path, tmp_path / name, model__attention=word, training__resources={"gpus": gpus})
    assert measure_model_size(chosen, dtype).is_masked is is_masked


def test_of_lora_few_products_are_trained(tmp_path: Path) -> None:
    size = measure_model_size(recipe(tmp_path, big_llama(tmp_path, "1b"), "lora"), torch.bfloat16)
    assert size.products.trained == size.trained < 0.01 * size.products.weights


def test_a_token_meets_only_the_experts_it_is_sent_to(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    hf.MixtralConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=8, num_experts_per_tok=2
    ).save_pretrained(tmp_path / "moe")
    size = measure_model_size(recipe(tmp_path, tmp_path / "moe"), torch.float32)
    experts = 2 * 8 * 3 * 64 * 96
    rest = size.parameters - experts - 500 * 64 - 5 * 64
    assert size.products.weights == rest + experts / 4


def test_an_encoder_decoder_has_two_sides(tmp_path: Path) -> None:
    made("t5").save_pretrained(tmp_path / "t5")
    size = measure_model_size(recipe(tmp_path, tmp_path / "t5"), torch.float32)
    assert 0 < size.products.weights < size.target_products.weights  # the decoder also attends to the encoder, and has the head
    assert size.weight_bytes == 4


def test_a_config_of_no_model(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "nothing-known"}')
    with pytest.raises(ModelError, match=r"odd has a config.json from which no model can be built"):
        measure_model_size(recipe(tmp_path, tmp_path / "odd"), torch.float32)
