"""Writing of a GGUF file, the format of llama.cpp, from a model folder: tensor by tensor, quantised on the way.

The names of tensors and keys are those of the package `gguf`, which llama.cpp's own converter uses. Known are Llama, Mistral,
Qwen 2 and Qwen 3 with byte-level BPE tokenizers; all else is refused, since a wrong guess gives a file that runs and answers badly.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, TokenType
from torch import Tensor

from apprentice.errors import ModelError
from apprentice.models.loading import read_config
from apprentice.models.weights.safetensors_reader import SafetensorsReader, weight_files
from apprentice.pretrained.tokenizer import Tokenizer

# Model types of transformers → architectures of llama.cpp.
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_FILE_TYPES = {
    "f32": (GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
NUMBER_FORMATS = tuple(_FILE_TYPES)
# Beginnings of the patterns by which byte-level tokenizers split texts → llama.cpp's names of these splits.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|": "qwen2",
}


def check_gguf(folder: Path, number_format: str) -> None:
    """Raises `ModelError` if the model in `folder` cannot be written as GGUF with numbers of that format."""
    if number_format not in _FILE_TYPES:
        raise ModelError(f"GGUF numbers of format {number_format!r} are not written here; choose {', '.join(_FILE_TYPES)}.")
    config = read_config(folder)
    if config.model_type not in _ARCHITECTURES:
        raise ModelError(
            f"GGUF has no architecture here for {config.model_type!r} (it has {', '.join(_ARCHITECTURES)}); export --format"
            " safetensors."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ModelError(
            f"rotary positions of type {rope['rope_type']!r} are not written to GGUF here; export --format safetensors and convert"
            " that with llama.cpp."
        )
    if not weight_files(folder):
        raise ModelError(f"{folder} has no safetensors files to make a GGUF file of; export the model again.")
    _split_name(_tokenizer_json(folder), folder)


def write_gguf(folder: Path, file: Path, number_format: str, name: str) -> None:
    """Writes the model in `folder` to `file`: matrices in `number_format`, vectors in float32; raises as `check_gguf`.

    Matrices whose rows do not fill Q8_0's blocks of 32 are written in float16.
    """
    check_gguf(folder, number_format)
    config = read_config(folder)
    architecture = _ARCHITECTURES[config.model_type]
    kind, file_type = _FILE_TYPES[number_format]
    reader = SafetensorsReader(weight_files(folder))
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, config)
    _add_tokenizer(writer, folder, config.vocab_size)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    kinds: dict[str, GGMLQuantizationType] = {}
    for key in sorted(reader.entries.keys() - tied):
        target, shape = names.get_name(key, try_suffixes=(".weight", ".bias")), reader.entries[key].shape
        if target is None:
            raise ModelError(f"{folder} has a tensor {key!r} that GGUF has no name for; export --format safetensors.")
        kinds[key] = GGMLQuantizationType.F32 if len(shape) < 2 else kind
        if kinds[key] == GGMLQuantizationType.Q8_0 and shape[-1] % 32:
            kinds[key] = GGMLQuantizationType.F16
        nbytes = int(np.prod(gguf.quant_shape_to_byte_shape(shape, kinds[key])))
        writer.add_tensor_info(target, gguf.quant_shape_to_byte_shape(shape, kinds[key]), np.dtype(np.uint8), nbytes, kinds[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, number_kind in kinds.items():
        values = _permuted(key, reader.read(key).float(), config)
        writer.write_tensor_data(gguf.quants.quantize(values.numpy(), number_kind).view(np.uint8))
    writer.close()


def _permuted(key: str, values: Tensor, config: Any) -> Tensor:
    """Queries and keys of a Llama in llama.cpp's order: its rotary positions turn neighbouring pairs of a head, not its halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    layer = key.split(".")[-2]
    if layer not in heads or config.model_type not in ("llama", "mistral"):
        return values
    return values.view(heads[layer], 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape).contiguous()


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        writer.add_sliding_window(config.sliding_window)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    content, tokenizer = _tokenizer_json(folder), Tokenizer(folder)
    texts = [f"[PAD{number}]" for number in range(size)]
    types = [TokenType.UNUSED] * size
    for text, number in content["model"]["vocab"].items():
        texts[number], types[number] = text, TokenType.NORMAL
    for token in content.get("added_tokens", []):
        texts[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(content, folder))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.end_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_bos_token_id(tokenizer.start_ids[0] if tokenizer.start_ids else tokenizer.end_id)
    writer.add_add_bos_token(bool(tokenizer.start_ids))
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _tokenizer_json(folder: Path) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return content


def _split_name(content: Mapping[str, Any], folder: Path) -> str:
    """llama.cpp's name of how a byte-level BPE tokenizer splits texts. Raises `ModelError` for another tokenizer."""
    splitter = content.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    kinds = [step.get("type") for step in steps]
    if content["model"].get("type") == "BPE" and kinds[-1:] == ["ByteLevel"] and not content.get("normalizer"):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
            return "smollm"
    if content["model"].get("type") == "BPE" and kinds == ["Split", "ByteLevel"]:
        pattern = str(steps[0]["pattern"].get("Regex"))
        for beginning, name in _SPLITS.items():
            if pattern.startswith(beginning):
                return name
    raise ModelError(
        f"the tokenizer in {folder} splits texts in a way that is not known to be one of llama.cpp's; export --format safetensors"
        " and convert that with llama.cpp, then compare its ids with `apprentice verify`."
    )
