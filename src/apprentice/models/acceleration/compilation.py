"""Compilation of a causal model's layers by `torch.compile`, each layer by itself, for rows of a few lengths.

All layers of a kind share their graphs. A graph is for one shape: batches bring rows of at most `LENGTHS` lengths and numbers of
sequences that are powers of two (`apprentice.train.batch`), so there are few. Where attention runs each example by itself, which
depends on the examples' sizes, it stays outside of the graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from apprentice.errors import ModelError
from apprentice.models import compat
from apprentice.models.attention.segments import SEGMENTS, segment_attention
from apprentice.models.tuning.experts import count_experts

LENGTHS = 4  # to which rows are padded: quarters of a packed row
MOST_GRAPHS = 64  # of one function; PyTorch's own limit, 8, is less than lengths times numbers of sequences


def check_compiles(config: Any) -> None:
    """Raises `ModelError` for models of which no layer is compiled: encoder-decoders, and mixtures of experts."""
    if config.is_encoder_decoder or count_experts(config):
        what = "an encoder-decoder" if config.is_encoder_decoder else "a mixture of experts"
        raise ModelError(f"training.compile is for causal models without experts, and {config.model_type} is {what}; set false.")


def compile_layers(model: Any, backend: str | Callable[..., Any] = "inductor") -> int:
    """Lets every layer of `model` be compiled when it is first called; the number of layers.

    Tuning methods may be wrapped around `model`. Raises `ModelError` for what `check_compiles` refuses, and without known layers.
    """
    from transformers import AttentionInterface

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_compiles(base.config)
    layers = compat.transformer_layers(base)
    if not layers:
        raise ModelError(f"training.compile finds no layers in {base.config.model_type}, which names none; set false.")
    settings: Any = torch.compiler.config
    settings.recompile_limit = max(settings.recompile_limit, MOST_GRAPHS)
    AttentionInterface.register(SEGMENTS, torch.compiler.disable(segment_attention))
    for layer in layers:
        layer.compile(backend=backend, dynamic=False)
    return len(layers)
