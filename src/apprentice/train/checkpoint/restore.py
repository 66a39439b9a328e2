"""Restoring of a model: the base model, wrapped by the recipe's tuning method, with the trained weights of a checkpoint.

base model ─▶ tuning method ─┬─▶ trained weights ─┬─▶ asynchronous validation
                             │                    ├─▶ export
                             │                    └─▶ rollouts of an on-policy run
                             └─▶ training, whose engine restores weights and optimizer state itself
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from apprentice.models.attention.backend_choice import PackedCompute
from apprentice.models.loading import load_model
from apprentice.models.tuning.methods import TUNING_METHODS, load_trainable, trainable_parameters
from apprentice.models.weights.splitter import GatheringSplitter
from apprentice.recipe import Recipe
from apprentice.train.checkpoint.format import WEIGHT

ReadTensor = Callable[[str], Tensor]  # key of a checkpoint → its tensor, float32


def restore_model(
    recipe: Recipe,
    read: ReadTensor | None,
    dtype: torch.dtype,
    *,
    attention: str | None = None,
    quantized: bool = True,
    packed: PackedCompute | None = None,
    splitter: GatheringSplitter | None = None,
) -> Any:
    """The model of `recipe` on the CPU in `dtype`, with the trained weights from `read`; without `read` as training begins.

    `attention` replaces the recipe's. `quantized` says whether a method that trains over a 4-bit base gets one. `packed` says where
    packed rows will run through it, None that it is for other work. With a `splitter` the base model is split as
    it is loaded; `read` must be None then. Raises `ModelError` if the weights do not belong to this model.
    """
    method = TUNING_METHODS[recipe.tuning.method]
    four_bit = quantized and method.four_bit
    attention = attention or recipe.model.attention
    settings: dict[str, Any] = {"four_bit": four_bit, "head": recipe.head, "trust": recipe.model.trust}
    packed = None if method.virtual_tokens else packed  # keys that no query belongs to: masks only
    base = load_model(recipe.model.base, dtype, attention, **settings, packed=packed, splitter=splitter)
    with nullcontext() if splitter is None else splitter.gather_on_use(base):  # virtual tokens begin as what words give in the base
        model = method.wrap(base, recipe.tuning, recipe.seed)
    if read is not None:
        load_trainable(model, _SavedWeights(trainable_parameters(model), read))
    return model


class _SavedWeights(Mapping[str, Tensor]):
    """A checkpoint's weights by parameter name, each read when it is asked for, so that memory never has all of them twice."""

    def __init__(self, names: Iterable[str], read: ReadTensor) -> None:
        self._names, self._read = list(names), read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(f"{WEIGHT}/{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
