"""Activation memory: bytes that a forward pass keeps for its backward pass, computed without allocating them.

The model is built and run on PyTorch's meta device, where tensors have shapes and no data, and the tensors that autograd would save
are added up. This needs no formula, and so holds for every architecture and tuning method.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from apprentice.models.loading import read_config
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.pretrained.architecture import family_of
from apprentice.pretrained.hub import local_folder
from apprentice.recipe import Recipe, Training
from apprentice.train.compat import storage_id, unread_positions
from apprentice.train.losses.target_losses import CHUNK_NUMBERS
from apprentice.train.memory.model_size import packs_with_mask
from apprentice.train.optimizer import number_formats

LOGIT_BYTES = 16  # for each logit at the peak: itself, its log-softmax in float32, and the gradients of the two
_log = logging.getLogger(__name__)
WORKING_TENSORS = 4  # temporary tensors of a backward pass, each as large as the largest saved one


@dataclass(frozen=True)
class SavedTensors:
    """Tensors but logits that a forward pass of `tokens` tokens saves: bytes of all and of the largest, and the model's sizes."""

    tokens: int
    saved: float
    largest: float
    layers: int
    hidden_size: int
    vocabulary: int
    itemsize: int

    def times(self, rows: int) -> SavedTensors:
        """The same for a micro-batch of `rows` times as many rows."""
        return replace(self, tokens=rows * self.tokens, saved=rows * self.saved, largest=rows * self.largest)

    @property
    def inputs(self) -> float:
        """Bytes of the inputs of all layers."""
        return float(self.layers * self.tokens * self.hidden_size * self.itemsize)

    def peak_bytes(self, training: Training, targets: int | None = None) -> float:
        """Peak bytes of activations on the training device.

        With activation checkpointing these are the inputs of the layers that are computed again and the inside of one of them, or
        its input alone where the others wait on the host; of all other layers it is the inside.
        """
        again, saved = training.computed_again, self.saved
        if again:
            inputs = self.inputs * (2 / self.layers if training.activation_checkpointing == "offload" else again)
            saved = inputs + saved * (1.0 - again) + saved / self.layers
        at_once = max(1, CHUNK_NUMBERS // self.vocabulary)
        logits = min(self.tokens if targets is None else targets, at_once) * self.vocabulary
        return saved + max(float(logits) * LOGIT_BYTES, WORKING_TENSORS * self.largest)


def estimate_activations(recipe: Recipe, dtype: torch.dtype, rows: int, length: int, targets: int | None = None) -> float | None:
    """Peak bytes for a micro-batch of `rows` packed rows of `length` tokens, `targets` of them target tokens (None: all).

    None for an architecture that cannot run on the meta device.
    """
    tensors = measure_saved_tensors(recipe, dtype, rows, length)
    if tensors is None:
        return None
    return tensors.peak_bytes(recipe.training, targets)


def measure_saved_tensors(recipe: Recipe, dtype: torch.dtype, rows: int, length: int) -> SavedTensors | None:
    """What a forward pass of `rows` packed rows of `length` tokens saves; None if the architecture cannot run on the meta device.

    Attention of a causal model gets a (length, length) mask only where training on the recipe's hardware would make one. Of rows
    that workers share it is what one of them saves.
    """
    length = math.ceil(length / recipe.training.sequence_parallel)
    try:
        saved, largest, config = _saved_by_forward(recipe, dtype, rows, length)
    except (NotImplementedError, RuntimeError, ValueError):
        return None
    except (TypeError, AttributeError):  # a defect here or in the model's code, which must not end a run
        _log.warning("what a forward pass of %s keeps is not known", recipe.model.base, exc_info=True)
        return None
    text = config.get_text_config()
    layers, vocabulary = max(1, int(text.num_hidden_layers)), int(text.vocab_size)
    return SavedTensors(rows * length, saved, largest, layers, int(text.hidden_size), vocabulary, dtype.itemsize)


def _saved_by_forward(recipe: Recipe, dtype: torch.dtype, rows: int, length: int) -> tuple[float, float, Any]:
    """Bytes of all saved tensors except logits, bytes of the largest of them, and the model's configuration."""
    folder = local_folder(recipe.model.base)
    seq2seq = family_of(folder) == "seq2seq"
    loader: Any = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    eager = recipe.model.attention == "eager"
    config = read_config(folder, "eager" if eager else None)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = loader.from_config(config, dtype=dtype)
        wrapped: Any = TUNING_METHODS[recipe.tuning.method].wrap(model, recipe.tuning, recipe.seed).train()
        if number_formats(recipe.training.optimizer, dtype).weights == dtype:
            wrapped.to(dtype)  # as DeepSpeed does
        ids = torch.empty((rows, length), dtype=torch.long)
        mask = torch.empty((rows, 1, length, length), dtype=torch.bool)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        virtual = any(config.is_prompt_learning for config in getattr(wrapped, "peft_config", {}).values())
        if seq2seq:
            inputs["decoder_input_ids"] = ids[:, : max(1, length // 4)]
        elif not virtual:  # behind virtual tokens a row is one example, given without positions
            inputs |= {"position_ids": ids}
            if eager or packs_with_mask(recipe, dtype, model):
                inputs |= {"attention_mask": torch.empty(mask.shape, dtype=dtype) if eager else mask}
        wrapped.get_output_embeddings().register_forward_pre_hook(lambda _, arguments: (arguments[0][:, :1], *arguments[1:]))
        with unread_positions(), patch.object(F, "scaled_dot_product_attention", _attention):
            sizes = _saved(wrapped, lambda: wrapped(**inputs).logits)
    return float(sum(sizes)), float(max(sizes, default=0)), config


def _saved(model: nn.Module, run: Callable[[], Tensor]) -> list[int]:
    """Bytes of each tensor that `run()` saves for its backward pass, without the model's parameters. Shared storage counts once."""
    own = {storage_id(parameter) for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (number := storage_id(tensor)) not in own:
            saved[number] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    del out
    return [storage.nbytes() for storage in saved.values()]


class _Fused(torch.autograd.Function):
    """Saves what fused attention saves: queries, keys, values, output, a float32 for each query, and the mask in the same dtype."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(query)
        numbers = [] if mask is None else [torch.empty(mask.shape, dtype=query.dtype)]
        context.save_for_backward(query, key, value, out, torch.empty(query.shape[:3], dtype=torch.float32), *numbers)
        return out

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Stands in for PyTorch's attention, which on the meta device saves tensors that no real device does."""
    fused: Any = _Fused
    out: Tensor = fused.apply(query, key, value, attn_mask)
    return out
