"""Packed rows as they come from the data pipeline, and the micro-batches of tensors that a model takes.

Pure. Knows nothing of the model, of Ray or of how many workers there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class RowFacts(NamedTuple):
    """What the record of a step needs to know of one packed row."""

    window: int
    row: int
    examples: list[int]  # plan positions
    tasks: list[int]  # number of each example's task
    targets: list[int]  # target tokens of each example
    dropped: dict[str, dict[str, int]]  # of the whole window, on its first row: task → reason → count


@dataclass(frozen=True)
class Micro:
    """What one forward pass takes; all of shape (rows, length)."""

    input_ids: Tensor
    positions: Tensor  # restart at 0 with each example
    is_target: Tensor  # bool: this token is predicted, and counts

    def to(self, device: torch.device) -> Micro:
        return Micro(self.input_ids.to(device), self.positions.to(device), self.is_target.to(device))


@dataclass(frozen=True)
class PackedRows:
    """Some packed rows; arrays of shape (rows, length)."""

    input_ids: NDArray[Any]
    positions: NDArray[Any]
    segment_ids: NDArray[Any]
    loss_mask: NDArray[Any]
    facts: list[RowFacts]

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> PackedRows:
        """From the pipeline's columns, as NumPy arrays or lists (one entry a row)."""
        table = {name: _table(columns[name]) for name in ("input_ids", "positions", "segment_ids", "loss_mask")}
        names = ("window", "row", "examples", "example_tasks", "example_targets", "dropped")
        facts = [
            RowFacts(int(window), int(row), _ints(examples), _ints(tasks), _ints(targets), json.loads(dropped) if dropped else {})
            for window, row, examples, tasks, targets, dropped in zip(*(columns[name] for name in names), strict=True)
        ]
        return cls(**table, facts=facts)

    def __len__(self) -> int:
        return len(self.facts)

    @property
    def tokens(self) -> int:
        """Real tokens; padding is not counted."""
        return int((self.segment_ids > 0).sum())

    @property
    def targets(self) -> int:
        """Tokens that are predicted and count. The first token of a row has nothing before it to be predicted from."""
        return int((self.loss_mask[:, 1:] > 0).sum())

    def micros(self, size: int) -> list[Micro]:
        """Micro-batches of `size` rows, without the columns at the end that are padding in all of them."""
        return [self._micro(start, start + size) for start in range(0, len(self), size)]

    def _micro(self, start: int, stop: int) -> Micro:
        used = np.flatnonzero((self.segment_ids[start:stop] > 0).any(axis=0))
        length = int(used[-1]) + 1 if len(used) else 1
        cut = (slice(start, stop), slice(0, length))
        # A copy: the arrays may be read-only views of shared memory, which torch does not take.
        return Micro(
            torch.from_numpy(self.input_ids[cut].astype(np.int64)),
            torch.from_numpy(self.positions[cut].astype(np.int64)),
            torch.from_numpy(self.loss_mask[cut].astype(np.bool_)),
        )

    def share(self, rank: int, workers: int) -> PackedRows:
        """Every `workers`-th row, beginning with row `rank`."""
        part = slice(rank, None, workers)
        arrays = (self.input_ids[part], self.positions[part], self.segment_ids[part], self.loss_mask[part])
        return PackedRows(*arrays, self.facts[part])


def _table(rows: Any) -> NDArray[Any]:
    return rows if isinstance(rows, np.ndarray) and rows.ndim == 2 else np.stack(list(rows))


def _ints(values: Sequence[Any]) -> list[int]:
    return [int(value) for value in values]


def micro_batch_rows(rows: int, length: int, budget: int) -> int:
    """Packed rows at once, for `auto`: the largest divisor of a worker's `rows` whose tokens are within `budget`; at least 1."""
    return max(size for size in range(1, rows + 1) if rows % size == 0 and (size == 1 or size * length <= budget))
