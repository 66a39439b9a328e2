"""Attention for packed rows in a model that was loaded for other work too: rounds and validation score it, or let it write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from apprentice.inference.compat import using_attention
from apprentice.models.attention.backend_choice import PackedCompute, choose_attention


@contextmanager
def packed_attention(model: Any, word: str, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within it `model`, on `device` and computing in `dtype`, has the attention that the recipe's `word` means for packed rows.

    Losses must be made within it too. `flash` is read as `auto` here; with virtual tokens nothing changes.
    """
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        yield
        return
    model_class = type(model.get_base_model() if hasattr(model, "get_base_model") else model)
    word = "auto" if word == "flash" else word
    name = choose_attention(word, PackedCompute.on(device, dtype), model.config, model_class)
    # The two sides of an encoder-decoder have configs of their own.
    configs = {id(side.config): side.config for side in model.modules() if isinstance(side, PreTrainedModel)}
    with ExitStack() as stack:
        if name is not None:
            for config in configs.values():
                stack.enter_context(using_attention(config, name))
        yield
