"""Splitting of a base model at ZeRO-3 while it is loaded: each worker reads and keeps its part of each parameter, and no more.

DeepSpeed's own way (`zero.Init` as a context) allocates each parameter whole on every worker and sends the first worker's.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apprentice.errors import ModelError
from apprentice.models.weights.parameter_source import ParameterSource
from apprentice.models.weights.safetensors_reader import weight_files
from apprentice.models.weights.splitter import find_split_obstacle
from apprentice.recipe import Training
from apprentice.train.engine import compat
from apprentice.train.engine.collectives import Collectives
from apprentice.train.engine.deepspeed_config import deepspeed_config

_COMPARED_AT_ONCE = 1 << 22  # elements


class ZeroSplitter:
    """Splits the parameters of a model among the workers of `collectives`, as ZeRO-3 does. All workers must call it alike.

    `bytes_read` counts what this worker has read of the weights' files.
    """

    def __init__(self, zero_init: Any, collectives: Collectives) -> None:
        self._zero_init = zero_init
        self._collectives = collectives
        self.bytes_read = 0

    def are_equal(self, one: ParameterSource, other: ParameterSource, numel: int, dtype: torch.dtype) -> bool:
        """Whether two parameters of `numel` elements have the same values in `dtype`; each worker compares a part."""
        part = -(-numel // self._collectives.workers)
        first = self._collectives.rank * part
        last = min(first + part, numel)
        is_equal = True
        for start in range(first, last, _COMPARED_AT_ONCE):
            values = [torch.empty(min(_COMPARED_AT_ONCE, last - start), dtype=dtype) for _ in range(2)]
            one.fill(start, values[0])
            other.fill(start, values[1])
            is_equal = is_equal and torch.equal(*values)
        return all(self._collectives.gather(is_equal))

    def split(self, parameter: nn.Parameter, source: ParameterSource) -> None:
        """Makes `parameter` one that is split, and reads this worker's part from `source`."""
        compat.split_parameter(self._zero_init, parameter, source.fill)

    def count_bytes(self, count: int) -> None:
        """Notes that this worker has read `count` bytes of weights."""
        self.bytes_read += count

    @contextlib.contextmanager
    def gather_on_use(self, model: nn.Module) -> Iterator[None]:
        """Inside it, forward passes without gradients run through the split `model`. All workers must run the same ones.

        Parts of it that are not split go to the device where weights are gathered.
        """
        model.to(self._zero_init.local_device)
        hooks = compat.GatherOnUse(model)
        try:
            yield
        finally:
            hooks.remove()


def find_stage_obstacle(training: Training) -> str | None:
    """Why a model cannot be split as it is loaded with these settings of DeepSpeed at stage 3; None where it can."""
    if training.deepspeed.offload_parameters == "nvme":
        return "its parameters go to disks (training.deepspeed.offload_parameters nvme)"
    settings = training.deepspeed.extra.get("zero_optimization", {})
    for key in ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if settings.get(key) not in (None, False, 1):
            return f"training.deepspeed.extra.zero_optimization.{key} keeps more than a share of each parameter"
    return None


def find_loading_obstacle(training: Training, base: Path, *, four_bit: bool = False) -> str | None:
    """Why every worker loads the whole model in folder `base` at stage 3; None where it is split as it is loaded."""
    return find_stage_obstacle(training) or find_split_obstacle(base, four_bit=four_bit)


def create_splitter(
    training: Training,
    base: Path,
    *,
    four_bit: bool,
    weights: torch.dtype,
    micro: int,
    device: torch.device,
    collectives: Collectives,
) -> ZeroSplitter | None:
    """The splitter for the model in folder `base`, whose `weights` have that dtype; None where every worker loads it whole.

    That is so below stage 3, and for what `find_loading_obstacle` says. All workers must call it. Raises `ModelError` if their
    files differ: parts of several models would become one, or a worker wait for others that load the model whole.
    """
    if training.deepspeed.stage < 3:
        return None
    obstacle = find_loading_obstacle(training, base, four_bit=four_bit)
    views = collectives.gather(obstacle or _file_sizes(base))
    if any(view != views[0] for view in views):
        raise ModelError(f"the model in {base} is not the same on all workers; give every machine the same files and packages.")
    if obstacle is not None:
        return None
    compat.import_deepspeed(device)
    bucket = training.deepspeed.extra.get("zero_optimization", {}).get("reduce_bucket_size")
    trainable = bucket if isinstance(bucket, int) else 1  # loading has no gradients; of the recipe's bucket the engine judges
    config = deepspeed_config(training, workers=collectives.workers, micro=micro, dtype=weights, trainable=trainable)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return ZeroSplitter(compat.zero_init(config), collectives)


def _file_sizes(base: Path) -> dict[str, int]:
    """Bytes of each file with the weights in folder `base`, by name; -1 for a file that is missing."""
    return {file.name: file.stat().st_size if file.is_file() else -1 for file in weight_files(base)}
