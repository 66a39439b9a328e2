"""Group of workers that share rows (`training.sequence_parallel`): its first one reads them, each computes a part of their tokens.

    rows of the group ─▶ first worker ─broadcast─▶ each worker: micro-batch, laid end to end, ─cut▶ its equal part of the tokens

Two rows of 5 tokens among 4 workers are 10 tokens and 2 of padding, 3 for each. Targets are shifted before the cut, so the last
token of a part predicts the next part's first one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from apprentice.recipe import data_parallel_size
from apprentice.train.batch import PackedRows, SequencePart, SupervisedBatch, target_places
from apprentice.train.sequence_bounds import SequenceBounds


@dataclass(frozen=True)
class SequenceGroup:
    """The group of `size` workers that this worker, its number `rank`, is in.

    `devices` carries what is computed, `hosts` (gloo) the rows; `first` is the rank of the group's first worker among all workers.
    """

    rank: int
    size: int
    first: int
    devices: Any
    hosts: Any

    @classmethod
    def join(cls, size: int) -> SequenceGroup | None:
        """Makes groups of `size` workers with neighbouring ranks; None if a worker has its rows for itself.

        All workers must call it. Raises `RecipeError` if they make no whole groups.
        """
        if size == 1:
            return None
        mine, workers = dist.get_rank(), dist.get_world_size()
        groups: dict[int, tuple[Any, Any]] = {}
        for number in range(data_parallel_size(workers, size)):  # every worker must take part in making every group
            ranks = list(range(number * size, (number + 1) * size))
            groups[number] = dist.new_group(ranks), dist.new_group(ranks, backend="gloo")
        number, rank = divmod(mine, size)
        return cls(rank, size, number * size, *groups[number])

    def share(self, rows: Iterator[PackedRows]) -> Iterator[PackedRows]:
        """The rows that the group's first worker gives, on all workers of it; what the others give is not looked at."""
        while True:
            item = [next(rows, None) if self.rank == 0 else None]
            dist.broadcast_object_list(item, src=self.first, group=self.hosts)
            if item[0] is None:
                return
            yield item[0]

    def part(self, batch: SupervisedBatch) -> SequencePart:
        """This worker's part of a micro-batch."""
        return cut_batch(batch, self.rank, self.size)


def cut_batch(batch: SupervisedBatch, rank: int, size: int) -> SequencePart:
    """Part `rank` of `size` equal parts of `batch`, whose rows are laid end to end and padded to a multiple of `size` tokens."""
    ids, positions, is_target, bounds = batch[:4]
    rows, length = ids.shape
    if positions is None or bounds is None:  # every row is one example
        positions = torch.arange(length).expand(rows, length)
        bounds = SequenceBounds.of_rows(ids)
    tokens = rows * length
    padding = -tokens % size
    first, last = (number * (tokens + padding) // size for number in (rank, rank + 1))
    targets = target_places(batch)
    targets = targets[(targets > first) & (targets <= last)]  # predicted by the tokens from `first` to before `last`
    flat_positions = torch.cat([positions.reshape(-1), torch.arange(padding)])
    return SequencePart(
        input_ids=F.pad(ids.reshape(-1), (0, padding))[None, first:last],
        positions=flat_positions[None, first:last],
        places=targets - 1 - first,
        labels=ids.flatten()[targets],
        weights=None if is_target.dtype == torch.bool else is_target.flatten()[targets],
        bounds=_with_padding(bounds, tokens, padding),
    )


def _with_padding(bounds: SequenceBounds, tokens: int, padding: int) -> SequenceBounds:
    if not padding:
        return bounds
    end = torch.tensor([tokens + padding], dtype=bounds.starts.dtype)
    return SequenceBounds(torch.cat([bounds.starts, end]), max(bounds.longest, padding))
