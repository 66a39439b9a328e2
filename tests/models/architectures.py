"""A tiny random model of every architecture that is promised to work, each of its own class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCABULARY = 500
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
_WINDOWS: dict[str, Any] = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    "init_std": 0.1,
}

CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, num_key_value_heads=1, tie_word_embeddings=True)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_SIZES, num_key_value_heads=1, sliding_window=64)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_SIZES, num_key_value_heads=2)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=32)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**_SIZES, **_WINDOWS, num_key_value_heads=1, head_dim=32, final_logit_softcapping=0.5, pad_token_id=0)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_SIZES, **_WINDOWS, num_key_value_heads=1, head_dim=32, pad_token_id=0)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=2, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZES)),
}
# Causal models whose layers, or some of them, mix texts that share a row: they are scored, and not packed.
MIXING: dict[str, Callable[[], Any]] = {
    "qwen3_5": lambda: hf.Qwen3_5ForCausalLM(
        hf.Qwen3_5TextConfig(
            **_SIZES,
            num_key_value_heads=1,
            head_dim=32,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            layer_types=["linear_attention", "full_attention"],
        )
    ),
    "lfm2": lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(**_SIZES, num_key_value_heads=1, layer_types=["conv", "full_attention"])),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=2)),
    "falcon_alibi": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, alibi=True)
    ),
}
_EXPERTS: dict[str, Any] = {"num_key_value_heads": 1, "num_experts_per_tok": 2}
# Mixture-of-experts models. A token is sent to two of four experts.
EXPERTS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_SIZES, **_EXPERTS, num_local_experts=4)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**_SIZES, **_EXPERTS, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=48)
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_SIZES, **_EXPERTS, head_dim=32, num_experts=4, moe_intermediate_size=32)
    ),
}
SEQ2SEQ: dict[str, Callable[[], Any]] = {
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "t5_v1.1": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "mt5": lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**_T5)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_BART)),
}


def made(name: str, attention: str | None = None) -> Any:
    """The model `name`, the same random weights every time, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = (CAUSAL | MIXING | EXPERTS | SEQ2SEQ)[name]()
    if attention is not None:
        model.set_attn_implementation(attention)
    return model.eval()
