"""Interface of what splits a model among processes as it is loaded, and the models that it cannot split."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
import transformers
from torch import nn

from apprentice.models.weights.parameter_source import ParameterSource
from apprentice.models.weights.safetensors_reader import weight_files
from apprentice.pretrained.architecture import model_config
from apprentice.run.identity import ADAPTER, ADAPTER_CONFIG

OLDEST_TRANSFORMERS = (5, 23)  # whose way of loading `compat.py` follows


class ModelSplitter(Protocol):
    """Splits parameters among the processes of a group, all of which call it alike."""

    def are_equal(self, one: ParameterSource, other: ParameterSource, numel: int, dtype: torch.dtype) -> bool:
        """Whether two parameters of `numel` elements have the same values in `dtype`."""

    def split(self, parameter: nn.Parameter, source: ParameterSource) -> None:
        """Makes `parameter`, which has a shape and no memory, one that is split, and reads this process's share from `source`."""

    def count_bytes(self, count: int) -> None:
        """Notes that this process has read `count` bytes of weights."""


class GatheringSplitter(ModelSplitter, Protocol):
    """A splitter that lets forward passes run through what it has split."""

    def gather_on_use(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside it, forward passes without gradients run through the split `model`."""


def find_split_obstacle(folder: Path, *, four_bit: bool = False) -> str | None:
    """Why the model in `folder` cannot be split as it is loaded; None where it can.

    Raises `ModelError` for a folder without a readable config.json.
    """
    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST_TRANSFORMERS:
        return f"transformers {transformers.__version__} is older than {'.'.join(map(str, OLDEST_TRANSFORMERS))}"
    config = model_config(folder)
    if four_bit or config.get("quantization_config"):
        return "its weights are quantised"
    if config.get("auto_map"):
        return "it brings code of its own"
    if config.get("transformers_weights"):
        return "its config.json names the file of its weights"
    if (folder / ADAPTER).is_dir() or (folder / ADAPTER_CONFIG).is_file():
        return "an adapter lies beside its weights"
    if not weight_files(folder):
        return "its weights are not in safetensors files (load it with transformers and save it once)"
    return None
