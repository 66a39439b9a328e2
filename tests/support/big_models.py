"""Models far too large for tests, as a config.json without weights."""

from __future__ import annotations

from pathlib import Path

from transformers import GPTNeoXConfig, LlamaConfig, T5Config

_LLAMA = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def big_llama(folder: Path, size: str) -> Path:
    """A folder with the config.json of a Llama of `size`: 1b, 8b or 70b."""
    options = {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False} | _LLAMA[size]
    LlamaConfig(vocab_size=128256, max_position_embeddings=131072, **options).save_pretrained(folder / f"llama-{size}")
    return folder / f"llama-{size}"


_T5 = {"xl": {"d_model": 2048, "d_ff": 5120, "num_heads": 32}, "xxl": {"d_model": 4096, "d_ff": 10240, "num_heads": 64}}


def big_t5(folder: Path, size: str) -> Path:
    """A folder with the config.json of a T5 1.1 of `size`: xl or xxl."""
    config = T5Config(
        vocab_size=32128, d_kv=64, num_layers=24, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **_T5[size]
    )
    config.save_pretrained(folder / f"t5-{size}")
    return folder / f"t5-{size}"


def smollm2(folder: Path) -> Path:
    """A folder with a config.json of the sizes of SmolLM2-135M."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    config.save_pretrained(folder / "smollm2")
    return folder / "smollm2"


def mpt_like(folder: Path, hidden_size: int, layers: int) -> Path:
    """A folder with the config.json of a GPT whose products are as large as those of MosaicML's MPT of the same sizes."""
    config = GPTNeoXConfig(
        vocab_size=50368,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 128,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    )
    config.save_pretrained(folder / f"mpt-{hidden_size}")
    return folder / f"mpt-{hidden_size}"
