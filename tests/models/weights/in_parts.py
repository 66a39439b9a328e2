"""A splitter for tests in one process: it keeps the share of one rank of each parameter, as plain tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apprentice.models.loading import load_model
from apprentice.models.weights.parameter_source import ParameterSource


class PartsOfOneRank:
    """Keeps what rank `rank` of `workers` reads: equal ranges of the flattened parameters, the last ones shorter."""

    def __init__(self, rank: int, workers: int) -> None:
        self.rank, self.workers = rank, workers
        self.parts: dict[nn.Parameter, Tensor] = {}
        self.bytes_read = 0
        self.largest_memory = 0

    def are_equal(self, one: ParameterSource, other: ParameterSource, numel: int, dtype: torch.dtype) -> bool:
        values = [torch.empty(numel, dtype=dtype) for _ in range(2)]
        one.fill(0, values[0])
        other.fill(0, values[1])
        return torch.equal(*values)

    def split(self, parameter: nn.Parameter, source: ParameterSource) -> None:
        self.largest_memory = max(self.largest_memory, parameter.untyped_storage().nbytes())
        size = -(-parameter.numel() // self.workers)
        start = min(self.rank * size, parameter.numel())
        part = torch.full((min(size, parameter.numel() - start),), float("nan"), dtype=parameter.dtype)
        source.fill(start, part)
        self.parts[parameter] = part

    def count_bytes(self, count: int) -> None:
        self.bytes_read += count


def load_in_parts(
    folder: Path, dtype: torch.dtype, workers: int, **options: Any
) -> tuple[Any, dict[str, Tensor], list[PartsOfOneRank]]:
    """The split model of the last of `workers` ranks, each parameter put together from the parts of all, and the splitters."""
    splitters = [PartsOfOneRank(rank, workers) for rank in range(workers)]
    models = [load_model(folder, dtype, splitter=splitter, **options) for splitter in splitters]
    named = [dict(model.named_parameters()) for model in models]
    whole = {
        name: torch.cat([splitter.parts[names[name]] for splitter, names in zip(splitters, named, strict=True)]).view(
            parameter.shape
        )
        for name, parameter in named[0].items()
    }
    return models[-1], whole, splitters
