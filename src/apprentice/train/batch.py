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
    window_rows: int | None = None  # rows of the whole window; None where every window has as many


class Micro(NamedTuple):
    """What one forward pass takes: the arguments of an objective's loss, in order."""

    tensors: tuple[Tensor | None, ...]

    @property
    def input_ids(self) -> Tensor:
        first = self.tensors[0]
        assert first is not None
        return first

    @property
    def positions(self) -> Tensor | None:
        """Restart at 0 with each example; None where each row has one."""
        return self.tensors[1]

    @property
    def is_target(self) -> Tensor:
        """Boolean: this token is predicted, and counts; or float32: what it counts, 0 where it is not predicted."""
        last = self.tensors[-1]
        assert last is not None
        return last

    def to(self, device: torch.device) -> Micro:
        return Micro(tuple(tensor if tensor is None else tensor.to(device) for tensor in self.tensors))


@dataclass(frozen=True)
class PackedRows:
    """Some packed rows; arrays of shape (rows, length), and on an encoder-decoder's other side (rows, target length)."""

    input_ids: NDArray[Any]
    positions: NDArray[Any]
    segment_ids: NDArray[Any]
    loss_mask: NDArray[Any]  # of the decoder's side, where there is one
    facts: list[RowFacts]
    target_ids: NDArray[Any] | None = None
    target_positions: NDArray[Any] | None = None
    target_segment_ids: NDArray[Any] | None = None
    weights: list[NDArray[Any]] | None = None  # each row's (examples,): what a target token of theirs counts, where that is not 1
    reference: list[NDArray[Any]] | None = None  # of preferences: each row's (answers,), the reference's log-probabilities
    # Of an on-policy round: each token's log-probability under the policy that wrote it and under the reference, (rows, length);
    # and each row's (replies,): how much better a reply is than the others to its prompt, and its reward.
    written: NDArray[Any] | None = None
    held: NDArray[Any] | None = None
    advantages: list[NDArray[Any]] | None = None
    rewards: list[NDArray[Any]] | None = None

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> PackedRows:
        """From the pipeline's columns, as NumPy arrays or lists (one entry a row)."""
        sides = ("target_ids", "target_positions", "target_segment_ids")
        found = (name for name in (*sides, "written", "held") if name in columns)
        wanted = ("input_ids", "positions", "segment_ids", "loss_mask", *found)
        table: dict[str, Any] = {name: _table(columns[name]) for name in wanted}
        names = ("window", "row", "examples", "example_tasks", "example_targets", "dropped")
        facts = [
            RowFacts(int(window), int(row), _ints(examples), _ints(tasks), _ints(targets), json.loads(dropped) if dropped else {})
            for window, row, examples, tasks, targets, dropped in zip(*(columns[name] for name in names), strict=True)
        ]
        if "window_rows" in columns:
            facts = [fact._replace(window_rows=int(rows)) for fact, rows in zip(facts, columns["window_rows"], strict=True)]
        ragged = {"weights": "example_weights"} | {name: name for name in ("reference", "advantages", "rewards")}
        more: dict[str, Any] = {
            name: [np.asarray(row) for row in columns[column]] for name, column in ragged.items() if column in columns
        }
        return cls(**table, facts=facts, **more)

    def __len__(self) -> int:
        return len(self.facts)

    @property
    def tokens(self) -> int:
        """Real tokens, of both sides; padding is not counted."""
        answers = 0 if self.target_segment_ids is None else int((self.target_segment_ids > 0).sum())
        return int((self.segment_ids > 0).sum()) + answers

    @property
    def targets(self) -> int:
        """Tokens that are predicted and count. The first token of a causal row has nothing before it to be predicted from."""
        counted = self.loss_mask[:, 1:] if self.target_ids is None else self.loss_mask
        return int((counted > 0).sum())

    @property
    def counted(self) -> float:
        """What the loss is a mean over: pairs of preferences, replies of a round, or else target tokens, each with its weight."""
        if self.reference is not None or self.advantages is not None:
            return sum(len(row.examples) for row in self.facts)
        if self.weights is None:
            return self.targets
        weights = self._target_weights(slice(None)).astype(np.float64)
        return float((weights[:, 1:] if self.target_ids is None else weights).sum())

    def _target_weights(self, rows: slice) -> NDArray[Any]:
        """What each place of `rows` counts: segments [1, 1, 2, 0] of weights [1, 0.1], all targets, give [1, 1, 0.1, 0]."""
        assert self.weights is not None
        segments = self.segment_ids if self.target_segment_ids is None else self.target_segment_ids
        each = [np.append(np.float32(0), row)[places] for row, places in zip(self.weights[rows], segments[rows], strict=True)]
        return np.stack(each).astype(np.float32) * (self.loss_mask[rows] > 0)

    def _targets_of(self, cut: tuple[slice, slice]) -> Tensor:
        """Boolean, or what each counts; see `Micro.is_target`."""
        if self.weights is None:
            return _tensor(self.loss_mask[cut], np.bool_)
        return _tensor(self._target_weights(cut[0])[:, cut[1]], np.float32)

    def micros(self, size: int) -> list[Micro]:
        """Micro-batches of `size` rows, without the columns at the end that are padding in all of them."""
        return [self._micro(slice(start, start + size)) for start in range(0, len(self), size)]

    def _micro(self, rows: slice) -> Micro:
        cut = (rows, _used(self.segment_ids[rows]))
        ids = _tensor(self.input_ids[cut])
        if self.reference is not None:
            return self._preferences(cut, ids, self.reference[rows])
        if self.written is not None and self.held is not None and self.advantages is not None and self.rewards is not None:
            tables = (_tensor(table[cut], np.float32) for table in (self.written, self.held))
            numbers, known = self._numbered(cut, self.advantages[rows])
            rewards = _joined(self.rewards[rows])
            is_target = _tensor(self.loss_mask[cut], np.bool_)
            return Micro((ids, _tensor(self.positions[cut]), numbers, *tables, known, rewards, is_target))
        if self.target_ids is None or self.target_positions is None or self.target_segment_ids is None:
            alone = int(self.segment_ids[rows].max(initial=0)) <= 1
            return Micro((ids, None if alone else _tensor(self.positions[cut]), self._targets_of(cut)))
        there = (rows, _used(self.target_segment_ids[rows]))
        sides = (self.target_ids[there], self.target_positions[there], self.target_segment_ids[there])
        return Micro((ids, _tensor(self.segment_ids[cut]), *map(_tensor, sides), self._targets_of(there)))

    def _preferences(self, cut: tuple[slice, slice], ids: Tensor, reference: list[NDArray[Any]]) -> Micro:
        answers, known = self._numbered(cut, reference)
        is_target = _tensor(self.loss_mask[cut], np.bool_)
        return Micro((ids, _tensor(self.positions[cut]), answers, known, is_target))

    def _numbered(self, cut: tuple[slice, slice], values: list[NDArray[Any]]) -> tuple[Tensor, Tensor]:
        """The number of each token's answer, and the `values` of all answers.

        Answers are counted on over the rows: segments [1, 1, 2, 2] and [1, 2, 2, 0] give [0, 0, 1, 1] and [2, 3, 3, 1].
        """
        before = np.cumsum([0, *map(len, values)])[:-1]
        return _tensor(self.segment_ids[cut] - 1 + before[:, None]), _joined(values)

    def share(self, rank: int, workers: int) -> PackedRows:
        """Every `workers`-th row, beginning with row `rank`."""
        part = slice(rank, None, workers)
        parts: dict[str, Any] = {name: None if value is None else value[part] for name, value in vars(self).items()}
        return PackedRows(**parts)


def _used(segments: NDArray[Any]) -> slice:
    """The columns up to the last that is no padding in some row; at least one."""
    columns = np.flatnonzero((segments > 0).any(axis=0))
    return slice(0, int(columns[-1]) + 1 if len(columns) else 1)


def _tensor(array: NDArray[Any], dtype: Any = np.int64) -> Tensor:
    # A copy: the arrays may be read-only views of shared memory, which torch does not take.
    return torch.from_numpy(array.astype(dtype))


def _table(rows: Any) -> NDArray[Any]:
    return rows if isinstance(rows, np.ndarray) and rows.ndim == 2 else np.stack(list(rows))


def _joined(values: list[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(values).astype(np.float32))


def _ints(values: Sequence[Any]) -> list[int]:
    return [int(value) for value in values]


def micro_batch_rows(rows: int, length: int, budget: int) -> int:
    """Packed rows at once, for `auto`: the largest divisor of a worker's `rows` whose tokens are within `budget`; at least 1."""
    return max(size for size in range(1, rows + 1) if rows % size == 0 and (size == 1 or size * length <= budget))
