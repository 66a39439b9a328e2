"""GGUF files that are written here, read back by transformers: the same weights, the same tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as hf

from apprentice.errors import ModelError
from apprentice.models.gguf import load_gguf
from apprentice.models.gguf_file import check_gguf, write_gguf
from apprentice.models.loading import load_model
from apprentice.pretrained.tokenizer import Tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 520,  # more than the tokenizer has
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, rope_theta=500.0)),
    "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=128)),  # as all of them have; transformers reads no other
}


def folder_of(name: str, tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / name
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(2)
    model = MODELS[name]()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_in_float32_the_model_is_the_same(name: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = folder_of(name, tiny_model, tmp_path)
    write_gguf(folder, tmp_path / "a.gguf", "f32", "tiny")
    model, ids = load_gguf(tmp_path / "a.gguf"), torch.tensor([[5, 6, 300, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, load_model(folder, torch.float32)(ids).logits, rtol=0, atol=1e-5)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    own = Tokenizer(folder)
    text = "<|im_start|>user\nName 17 colours, café!<|im_end|>"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == own.encode(text)
    assert (tokenizer.eos_token_id, tokenizer.chat_template) == (own.end_id, own.chat_template)


@pytest.mark.parametrize(("numbers", "most"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 1e-2)])
def test_narrower_numbers(numbers: str, most: float, tiny_model: Path, tmp_path: Path) -> None:
    folder = folder_of("llama", tiny_model, tmp_path)
    write_gguf(folder, tmp_path / "a.gguf", numbers, "tiny")
    kinds = {str(tensor.tensor_type.name) for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds == {"F32", numbers.upper()}
    state = load_model(folder, torch.float32).state_dict()
    for key, values in load_gguf(tmp_path / "a.gguf").state_dict().items():
        assert (values - state[key]).abs().max() <= most * state[key].abs().max(), key


def test_what_gguf_does_not_have(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_model, folder)
    hf.GPT2Config(vocab_size=512).save_pretrained(folder)
    with pytest.raises(ModelError, match="GGUF has no architecture here for 'gpt2'"):
        check_gguf(folder, "f16")
    with pytest.raises(ModelError, match="of format 'q2_k' are not written here; choose f32, f16, bf16, q8_0"):
        check_gguf(tiny_model, "q2_k")
    scaled = folder_of("llama", tiny_model, tmp_path)
    hf.LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}).save_pretrained(scaled)
    with pytest.raises(ModelError, match="rotary positions of type 'linear'"):
        check_gguf(scaled, "f16")
    text = (scaled / "tokenizer.json").read_text().replace('"ByteLevel"', '"Metaspace"', 1)
    hf.LlamaConfig(**SIZES).save_pretrained(scaled)
    (scaled / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="splits texts in a way that is not known"):
        check_gguf(scaled, "f16")
