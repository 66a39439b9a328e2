"""Size of a model with its tuning method, from config.json alone: its parameters, those trained, and the products of a token.

The model is built on PyTorch's meta device, so a model of any size takes no memory.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from apprentice.errors import ModelError
from apprentice.models.attention.backend_choice import PackedCompute, choose_attention, has_masks
from apprentice.models.loading import read_config
from apprentice.models.tuning.experts import active_share
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.pretrained.architecture import family_of
from apprentice.pretrained.hub import local_folder
from apprentice.recipe import Recipe
from apprentice.train.optimizer import number_formats


@dataclass(frozen=True)
class Products:
    """Numbers of weights with which one token is multiplied: all of them, and those that are trained."""

    weights: float = 0.0
    trained: float = 0.0


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model as it is trained.

    `products` are those of a token of a row; `target_products` those of a token of the decoder's side, of an encoder-decoder only.
    `attention_width` is the number of heads times the numbers in each.
    """

    parameters: int
    trained: int
    products: Products
    target_products: Products
    layers: int
    attention_width: int
    dtype: torch.dtype  # of the products
    weight_bytes: int  # 2 or 4 a weight, but for those in 4 bits
    is_masked: bool  # whether attention computes whole packed rows with a mask, and not each example of a row for itself
    quantized: int = 0  # number of weights in 4 bits
    largest_module: int = 0  # most numbers in a module's own parameters, such as an embedding or the experts of a layer
    active: Products = field(default_factory=Products)  # numbers that a token meets, embeddings and norms among them

    @property
    def is_16_bit(self) -> bool:
        """Whether the weights have 16 bits."""
        return self.weight_bytes == 2


def measure_model_size(recipe: Recipe, dtype: torch.dtype) -> ModelSize:
    """Size of the recipe's model, with products in `dtype`. Raises `ModelError` if no model can be built from its config.json."""
    folder = local_folder(recipe.model.base)
    loader: Any = AutoModelForSeq2SeqLM if family_of(folder) == "seq2seq" else AutoModelForCausalLM
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            config = read_config(folder)
            base = loader.from_config(config, dtype=dtype)
            quantized = _count_quantizable(base) if TUNING_METHODS[recipe.tuning.method].four_bit else 0
            model: Any = TUNING_METHODS[recipe.tuning.method].wrap(base, recipe.tuning, recipe.seed)
    except (OSError, ValueError, NotImplementedError) as error:
        raise ModelError(
            f"{folder} has a config.json from which no model can be built: {' '.join(str(error).split())[:200]}"
        ) from error
    text = config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", None) or 0)  # none in state-space models
    width = int(getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or text.hidden_size // max(heads, 1))
    encoder, rest = _products(model, text, in_encoder=True), _products(model, text, in_encoder=False)
    is_pair = bool(config.is_encoder_decoder)
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        products=encoder if is_pair else rest,
        target_products=rest if is_pair else Products(),
        layers=int(text.num_hidden_layers),
        attention_width=heads * width,
        dtype=dtype,
        weight_bytes=number_formats(recipe.training.optimizer, dtype).weights.itemsize,
        is_masked=packs_with_mask(recipe, dtype, base),
        quantized=quantized,
        largest_module=max(sum(own.numel() for own in module.parameters(recurse=False)) for module in model.modules()),
        active=_count_active(model, text),
    )


def count_quantized(recipe: Recipe) -> int:
    """Number of weights that the tuning method keeps in 4 bits. Raises what `measure_model_size` does."""
    return measure_model_size(recipe, torch.bfloat16).quantized if TUNING_METHODS[recipe.tuning.method].four_bit else 0


def _count_quantizable(model: Any) -> int:
    """Number of weights that bitsandbytes quantizes as transformers has it: matrices of linear layers but the output layer's."""
    output = model.get_output_embeddings()
    linear = (module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not output)
    return sum(module.weight.numel() for module in linear)


def packs_with_mask(recipe: Recipe, dtype: torch.dtype, model: Any) -> bool:
    """Whether packed rows need a mask: on CPUs or on GPUs (Ampere or newer)."""
    device = "cuda" if recipe.training.resources.gpus else "cpu"
    word = "auto" if recipe.model.attention == "flash" else recipe.model.attention  # its package is needed there, not here
    packed = PackedCompute(device, dtype, (8, 0), recipe.training.sequence_parallel)
    return has_masks(choose_attention(word, packed, model.config, type(model)))


def _products(model: Any, config: Any, *, in_encoder: bool) -> Products:
    """The products of one token with the weights in the encoder, or with all others. Looking up an embedding is no product."""
    output = model.get_output_embeddings().weight
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - {id(output)}
    weights = trained = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or id(parameter) in embeddings or ("encoder" in name.split(".")) != in_encoder:
            continue
        numbers = parameter.numel() * active_share(name, parameter, config)
        weights += numbers
        trained += numbers if parameter.requires_grad else 0.0
    return Products(weights, trained)


def _count_active(model: Any, config: Any) -> Products:
    """Numbers that a token meets, of all parameters and of those that are trained: of experts, the ones it is sent to."""
    counts = [
        (parameter.numel() * active_share(name, parameter, config), parameter.requires_grad)
        for name, parameter in model.named_parameters()
    ]
    return Products(sum(count for count, _ in counts), sum(count for count, is_trained in counts if is_trained))
