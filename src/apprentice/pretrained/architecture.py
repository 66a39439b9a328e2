"""What kind of model a folder holds, from its config.json alone: one that continues a text, or one that reads and then writes.

Knows nothing of weights; imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from apprentice.errors import ModelError

Family = Literal["causal", "seq2seq"]
FAMILIES: dict[Family, str] = {"causal": "causal language model", "seq2seq": "sequence-to-sequence model"}
# Sequence-to-sequence types whose positions are relative to one another, so that examples can share a row.
RELATIVE_POSITIONS = ("t5", "mt5", "umt5")
# Causal types in which restarting positions do not keep examples of one row apart, and why; tried with tiny random models of 50
# types: from 4e-4 (jamba) to 1.6 (rwkv) between packed and unpacked logits here, at most 2e-7 in those that pack.
NOT_PACKED = {
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba", "recurrent_gemma", "rwkv", "jamba", "bamba", "zamba", "zamba2"),
        "what a recurrent layer remembers runs on into the next example",
    ),
    **dict.fromkeys(
        ("qwen3_next", "falcon_h1", "granitemoehybrid", "nemotron_h", "lfm2", "lfm2_moe"),
        "what a recurrent or convolutional layer remembers runs on into the next example",
    ),
    **dict.fromkeys(("opt", "bloom", "mpt", "xglm", "biogpt", "gpt_oss"), "this architecture does not follow restarting positions"),
}
# Kinds of layers, in the words of transformers' `layer_types`, that carry a state from token to token whatever a mask says.
STATEFUL_LAYERS = ("linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding")
# Types whose activations leave float16's range.
NO_FLOAT16 = ("t5", "mt5", "umt5")


def family_of(folder: Path) -> Family:
    """`seq2seq` for an encoder with a decoder (T5, BART and their kin), otherwise `causal`.

    Raises `ModelError` if `folder` has no config.json that can be read.
    """
    return "seq2seq" if model_config(folder).get("is_encoder_decoder") else "causal"


def gives_rewards(folder: Path) -> bool:
    """Whether the model in `folder` gives an answer a number and writes none."""
    return any(str(name).endswith("ForSequenceClassification") for name in model_config(folder).get("architectures") or ())


def check_writes(folder: Path) -> None:
    """Raises `ModelError` for a reward model, which is asked to write."""
    if gives_rewards(folder):
        raise ModelError(
            f"{folder} is a reward model: it gives answers a number and writes none. Score pairs of answers with `apprentice"
            " evaluate`, or name a model that writes."
        )


def can_pack(folder: Path) -> bool:
    """Whether examples of the model in `folder` can share a row and stay apart."""
    return not_packed_because(folder) is None


def not_packed_because(folder: Path, *, by_layers: bool = True) -> str | None:
    """Why examples of one row would see each other; None where they stay apart.

    `by_layers` False asks the model's type alone, as runs of format 1 did, whose rows must not change.
    """
    config = model_config(folder)
    kind = config.get("model_type")
    if config.get("is_encoder_decoder") and kind not in RELATIVE_POSITIONS:
        return f"the positions of {kind} count the whole row"
    return mixes_because(config) if by_layers else NOT_PACKED.get(str(kind))


def mixes_because(config: dict[str, Any]) -> str | None:
    """Why a causal model of this config mixes texts that share a row, though mask and positions keep them apart; else None."""
    inner = config.get("text_config") or config
    for part in (config, inner):
        if reason := NOT_PACKED.get(str(part.get("model_type"))):
            return reason
    if any(kind in STATEFUL_LAYERS for kind in inner.get("layer_types") or ()):
        return "what a recurrent or convolutional layer remembers runs on into the next example"
    return "ALiBi biases count the whole row" if inner.get("alibi") else None


def model_config(folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises `ModelError` if it cannot be read."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder} is not a model folder: its config.json cannot be read ({error}).") from error


def kv_numbers(config: dict[str, Any]) -> int | None:
    """How many numbers one token's keys and values are in all layers; None where `config` does not say it in the usual words."""
    inner = config.get("text_config") or config
    layers = inner.get("num_hidden_layers") or inner.get("num_layers") or inner.get("n_layer")
    heads = inner.get("num_attention_heads") or inner.get("num_heads") or inner.get("n_head")
    hidden = inner.get("hidden_size") or inner.get("d_model") or inner.get("n_embd")
    if not (layers and heads and hidden):
        return None
    width = inner.get("head_dim") or inner.get("d_kv") or hidden // heads
    return int(2 * layers * (inner.get("num_key_value_heads") or heads) * width)
