"""Architecture facts from a model's config.json alone: causal or encoder-decoder, reward model or not, whether rows can pack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from apprentice.errors import ModelError

Family = Literal["causal", "seq2seq"]
FAMILIES: dict[Family, str] = {"causal": "causal language model", "seq2seq": "sequence-to-sequence model"}
# Sequence-to-sequence types whose positions are relative to one another, so that examples can share a row.
RELATIVE_POSITIONS = ("t5", "mt5", "umt5")
# Causal types in which restarting positions do not keep examples of one row apart, and why. Tried with tiny random models of 50
# types: packed and unpacked logits differ by 4e-4 (jamba) to 1.6 (rwkv) in these, and by at most 2e-7 in those that pack.
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
# Kinds of layers, by transformers' `layer_types`, that carry a state from token to token whatever the attention mask is.
STATEFUL_LAYERS = ("linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding")
# Types whose activations overflow float16.
NO_FLOAT16 = ("t5", "mt5", "umt5")


def family_of(folder: Path) -> Family:
    """`seq2seq` for an encoder with a decoder (T5, BART and their kin), otherwise `causal`.

    Raises `ModelError` if `folder` has no config.json that can be read.
    """
    return "seq2seq" if model_config(folder).get("is_encoder_decoder") else "causal"


def gives_rewards(folder: Path) -> bool:
    """Whether the model in `folder` is a reward model (`…ForSequenceClassification`)."""
    return any(str(name).endswith("ForSequenceClassification") for name in model_config(folder).get("architectures") or ())


def check_generates_text(folder: Path) -> None:
    """Raises `ModelError` if the model in `folder` is a reward model, which cannot generate text."""
    if gives_rewards(folder):
        raise ModelError(
            f"{folder} is a reward model: it gives answers a number and writes none. Score pairs of answers with `apprentice"
            " evaluate`, or name a model that writes."
        )


def can_pack(folder: Path) -> bool:
    """Whether examples can share a row of the model in `folder` without seeing each other."""
    return packing_obstacle(folder) is None


def packing_obstacle(folder: Path, *, by_layers: bool = True) -> str | None:
    """Why examples that share a row would see each other in the model in `folder`; None where they do not.

    With `by_layers` False only the model's type counts, as in runs of format 1, whose rows must not change.
    """
    config = model_config(folder)
    kind = config.get("model_type")
    if config.get("is_encoder_decoder") and kind not in RELATIVE_POSITIONS:
        return f"the positions of {kind} count the whole row"
    return mixing_obstacle(config) if by_layers else NOT_PACKED.get(str(kind))


def mixing_obstacle(config: dict[str, Any]) -> str | None:
    """Why a causal model of this config mixes examples of a row in spite of mask and positions; None where it does not."""
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


def vocabulary_size(folder: Path) -> int:
    """Number of tokens that the model in `folder` gives logits for."""
    config = model_config(folder)
    return int((config.get("text_config") or config)["vocab_size"])


def kv_values_per_token(config: dict[str, Any]) -> int | None:
    """Numbers in one token's KV cache over all layers; None where `config` has none of the usual keys."""
    inner = config.get("text_config") or config
    layers = inner.get("num_hidden_layers") or inner.get("num_layers") or inner.get("n_layer")
    heads = inner.get("num_attention_heads") or inner.get("num_heads") or inner.get("n_head")
    hidden = inner.get("hidden_size") or inner.get("d_model") or inner.get("n_embd")
    if not (layers and heads and hidden):
        return None
    width = inner.get("head_dim") or inner.get("d_kv") or hidden // heads
    return int(2 * layers * (inner.get("num_key_value_heads") or heads) * width)
