"""Kinds of loaded models: encoder-decoders, and models with virtual tokens."""

from __future__ import annotations

from typing import Any


def is_encoder_decoder(model: Any) -> bool:
    """True for an encoder-decoder, such as T5 or BART."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def has_virtual_tokens(model: Any) -> bool:
    """True for a model with prefix or prompt tuning, which puts trained virtual tokens before every text."""
    return count_virtual_tokens(model) > 0


def count_virtual_tokens(model: Any) -> int:
    """Number of trained virtual tokens before every text."""
    configs = getattr(model, "peft_config", {}).values()
    return max((config.num_virtual_tokens for config in configs if config.is_prompt_learning), default=0)
