"""Collectives on small Python values: gather, sum and barrier over torch.distributed, or in a single process without it.

They use a gloo group of their own, whatever backend carries the gradients, so that they never wait for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from apprentice.recipe import data_parallel_size

T = TypeVar("T")


class Collectives:
    """The workers of a run; a process without torch.distributed is the only one. All workers must create it together.

    `sequence_parallel` neighbours share rows: of `readers` groups that have rows of their own, this worker is in group `reader`.
    """

    def __init__(self, sequence_parallel: int = 1) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.workers = dist.get_world_size() if together else 1
        self.readers = data_parallel_size(self.workers, sequence_parallel)
        self.reader = self.rank // sequence_parallel
        self._group: Any = dist.new_group(backend="gloo") if self.workers > 1 else None

    def gather(self, value: T) -> list[T]:
        """Every worker's `value`, in order of rank, on every worker."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.workers
        dist.all_gather_object(values, value, group=self._group)
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each of `values` over all workers, in float64, on every worker."""
        if self._group is None:
            return [float(value) for value in values]
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return [float(value) for value in total]

    def wait(self) -> None:
        """Barrier: returns when all workers have called it."""
        if self._group is not None:
            dist.barrier(group=self._group)
