"""A model with a checkpoint's weights."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
from torch import Tensor

from apprentice.models.loading import load_model
from apprentice.models.tuning.methods import trainable_parameters
from apprentice.recipe import Recipe
from apprentice.train.checkpoint.restore import restore_model


def test_weights_are_read_one_at_a_time(tiny_model: Path) -> None:
    """Read all at once, they would take twice the memory that the task which exports or validates a model asks for."""
    method = {"tuning": {"method": "full"}, "training": {"steps": 1}}
    recipe = Recipe.model_validate({"name": "r", "model": {"base": str(tiny_model)}, "data": {"tasks": ["t"]}} | method)
    shapes = {name: parameter.shape for name, parameter in trainable_parameters(load_model(tiny_model, torch.float32)).items()}
    tensors: list[weakref.ref[Tensor]] = []

    def read(key: str) -> Tensor:
        assert sum(tensor() is not None for tensor in tensors) <= 1
        values = torch.full(shapes[key.removeprefix("weight/")], float(len(tensors)))
        tensors.append(weakref.ref(values))
        return values

    model = restore_model(recipe, read, torch.float32)
    assert len(tensors) == len(shapes)
    values = sorted(float(parameter.detach().max()) for parameter in trainable_parameters(model).values())
    assert values == list(range(len(shapes)))
