"""A model that is split as it is loaded is, put together again, the model that transformers loads, to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from apprentice.errors import ModelError
from apprentice.models.loading import load_model
from apprentice.models.weights.splitter import find_split_obstacle
from tests.models.architectures import CAUSAL, MIXING, SEQ2SEQ, made
from tests.models.weights.in_parts import load_in_parts

_EXPERTS: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# Architectures whose files hold each expert by itself, and whose parameters hold all experts of a layer.
MIXTURES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_EXPERTS, num_local_experts=4)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **_EXPERTS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=12
        )
    ),
}


def assert_same(folder: Path, dtype: torch.dtype = torch.float32, workers: int = 3, **options: Any) -> tuple[Any, Any, list[Any]]:
    """Compares split and unsplit loading of `folder`; returns both models, and the splitters."""
    expected: Any = load_model(folder, dtype, **options)
    model, whole, splitters = load_in_parts(folder, dtype, workers, **options)
    parameters = dict(expected.named_parameters())
    assert whole.keys() == parameters.keys() != set()  # so what is tied is the same too
    assert [name for name, value in parameters.items() if not torch.equal(value.to(dtype), whole[name])] == []
    buffers = dict(expected.named_buffers())
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, value in model.named_buffers():
        assert value.dtype == buffers[name].dtype, name
        assert torch.equal(value, buffers[name]), name
    assert type(model) is type(expected)
    assert not model.training
    assert model.config._attn_implementation == expected.config._attn_implementation
    return model, expected, splitters


def bytes_of(folder: Path) -> int:
    """Bytes of all numbers in the files of `folder`."""
    return sum(value.nbytes for file in folder.glob("*.safetensors") for value in load_file(file).values())


@pytest.mark.parametrize("name", [*CAUSAL, *MIXING, *SEQ2SEQ])
def test_every_architecture(name: str, tmp_path: Path) -> None:
    made(name).save_pretrained(tmp_path)
    _, _, splitters = assert_same(tmp_path)
    assert all(splitter.largest_memory <= 4 for splitter in splitters)  # no parameter ever had memory
    buffers = 3 * sum(
        value.nbytes for key, value in load_file(tmp_path / "model.safetensors").items() if key == "final_logits_bias"
    )
    once = bytes_of(tmp_path)
    assert once <= sum(splitter.bytes_read for splitter in splitters) <= once + buffers


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_read_by_ranges(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    MIXTURES[name]().save_pretrained(tmp_path)
    assert any("experts.3" in key for key in load_file(tmp_path / "model.safetensors"))
    _, _, splitters = assert_same(tmp_path)
    assert sum(splitter.bytes_read for splitter in splitters) == bytes_of(tmp_path)


def test_bfloat16_of_float32_files_in_several_pieces(tmp_path: Path) -> None:
    model = made("llama")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    save_file({"other": torch.zeros(5)}, tmp_path / "consolidated.safetensors")  # the maker's own format, which nobody reads
    assert_same(tmp_path, torch.bfloat16)


def test_more_processes_than_numbers(tmp_path: Path) -> None:
    made("qwen3").save_pretrained(tmp_path)  # its norms of queries have 32 numbers
    assert_same(tmp_path, workers=50)


@pytest.mark.parametrize("is_tied", [True, False])
def test_both_of_a_tied_pair_in_the_file(tmp_path: Path, is_tied: bool) -> None:
    made("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + (0.0 if is_tied else 1.0)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model, _, _ = assert_same(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is is_tied


def test_only_the_other_of_a_tied_pair_in_the_file(tmp_path: Path) -> None:
    made("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same(tmp_path)


def test_buffers_that_stay_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.Dots1Config(
        **_EXPERTS, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, n_shared_experts=1, first_k_dense_replace=1
    )
    made_model = hf.Dots1ForCausalLM(config)
    for name, buffer in made_model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(8 + torch.arange(4) / 1000)  # bfloat16 cannot tell them apart
    made_model.save_pretrained(tmp_path)
    model, _, _ = assert_same(tmp_path, torch.bfloat16)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert biases
    assert all(len(set(bias.tolist())) == 4 for bias in biases)


def test_the_text_model_of_a_model_of_several_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {**_EXPERTS, "intermediate_size_mlp": 24, "head_dim": 8, "num_local_experts": 2, "pad_token_id": 0}
    config = hf.Llama4Config(text_config=text)
    hf.Llama4ForCausalLM(config.text_config).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    assert_same(tmp_path)


def test_a_model_that_gives_no_rewards(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = hf.CohereConfig(**_EXPERTS, pad_token_id=0)
    hf.CohereForCausalLM(text).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model: Unrecognized configuration class"):
        load_in_parts(tmp_path, torch.float32, 2, head=1)


def test_a_reward_models_new_head_is_the_same_everywhere(tmp_path: Path) -> None:
    made("llama").save_pretrained(tmp_path)
    model, expected, _ = assert_same(tmp_path, head=7)
    assert model.score.weight.shape == (1, 64)
    assert expected.score.weight.abs().sum() > 0


def test_a_reward_models_head_comes_from_its_file(tmp_path: Path) -> None:
    made("qwen2").save_pretrained(tmp_path / "base")
    load_model(tmp_path / "base", torch.float32, head=3).save_pretrained(tmp_path / "reward")
    assert_same(tmp_path / "reward", head=5)


def test_names_without_the_prefix(tmp_path: Path) -> None:
    made("gpt2").save_pretrained(tmp_path)
    weights = {key.removeprefix("transformer."): value for key, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights | {"h.0.attn.bias": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same(tmp_path)


def test_missing_weights(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights, 'model.layers.0.self_attn.q_proj.weight' among them"):
        load_in_parts(tmp_path / "model", torch.float32, 2)


def test_a_weight_of_another_shape(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load_model(tmp_path / "model", torch.float32)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load_in_parts(tmp_path / "model", torch.float32, 2)


def test_what_cannot_be_split(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(name: str, config: dict[str, Any]) -> Path:
        shutil.copytree(tiny_model, tmp_path / name)
        known = json.loads((tiny_model / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(known | config))
        return tmp_path / name

    assert find_split_obstacle(tiny_model) is None
    assert find_split_obstacle(tiny_model, four_bit=True) == "its weights are quantised"
    assert find_split_obstacle(folder("quantised", {"quantization_config": {"bits": 4}})) == "its weights are quantised"
    assert find_split_obstacle(folder("code", {"auto_map": {"AutoModel": "a.B"}})) == "it brings code of its own"
    (folder("adapter", {}) / "adapter").mkdir()
    assert find_split_obstacle(tmp_path / "adapter") == "an adapter lies beside its weights"
    (folder("embedded", {}) / "adapter_config.json").write_text("{}")
    assert find_split_obstacle(tmp_path / "embedded") == "an adapter lies beside its weights"
    named = folder("named", {"transformers_weights": "other.safetensors"})
    assert find_split_obstacle(named) == "its config.json names the file of its weights"
    (folder("pickled", {}) / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    obstacle = "its weights are not in safetensors files (load it with transformers and save it once)"
    assert find_split_obstacle(tmp_path / "pickled") == obstacle
    monkeypatch.setattr("apprentice.models.weights.splitter.transformers.__version__", "5.17.1")
    assert find_split_obstacle(tiny_model) == "transformers 5.17.1 is older than 5.23"
