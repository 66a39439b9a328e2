"""Attention for packed rows in a model that was loaded for other work too: rounds and validation score it, or let it write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from apprentice.inference.compat import using_attention
from apprentice.models.attention import PackedCompute, choose_attention
from apprentice.train.compat import attention_name


@contextmanager
def packed_attention(model: Any, word: str, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within it `model`, on `device` and computing in `dtype`, has the attention that the recipe's `word` means for packed rows.

    Losses must be made within it too. `flash` is read as `auto` here; on CPUs and with virtual tokens nothing changes.
    """
    has_virtual_tokens = any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())
    if device.type == "cpu" or has_virtual_tokens:
        yield
        return
    model_class = type(model.get_base_model() if hasattr(model, "get_base_model") else model)
    word = "auto" if word == "flash" else word
    name = choose_attention(word, PackedCompute.on(device, dtype), model.config, model_class)
    with using_attention(model.config, name or attention_name(model)):
        yield
