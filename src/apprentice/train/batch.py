"""Batches: packed rows as NumPy arrays from the data pipeline, and micro-batches of tensors for one forward pass.

Two examples of 3 and 2 tokens in a row of 6, each with one answer token:

    input_ids    a a b c d 0
    positions    0 1 2 0 1 0      restart at 0 with each example and with the padding
    segment_ids  1 1 1 2 2 0      number of the example in its row; 0 is padding
    loss_mask    0 0 1 0 1 0      1 on target tokens

The columns are described in `apprentice.data.window`.
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
    """Bookkeeping of one packed row: its place in the stream and the examples in it."""

    window: int
    row: int
    examples: list[int]  # their positions in the sampling plan
    tasks: list[int]  # each example's task number
    targets: list[int]  # each example's number of target tokens
    dropped: dict[str, dict[str, int]]  # for the whole window, on its first row only: task → reason → count
    window_rows: int | None = None  # rows in the window; None where every window has the same number


class Micro(NamedTuple):
    """A micro-batch: the tensors of one forward pass, in the order in which the objective's loss takes them.

    sft, causal            input_ids, positions (or None), is_target
    sft, encoder-decoder   input_ids, segment_ids, target_ids, target_positions, target_segment_ids, is_target
    dpo, reward            input_ids, positions, answers, reference, is_target
    grpo                   input_ids, positions, replies, written, reference, advantages, rewards, is_target

    Ids, positions and numbers are int64; log-probabilities, advantages and rewards float32.
    """

    tensors: tuple[Tensor | None, ...]

    @property
    def input_ids(self) -> Tensor:
        first = self.tensors[0]
        assert first is not None
        return first

    @property
    def positions(self) -> Tensor | None:
        """Positions of a causal model's tokens, (rows, length), restarting with each example; None if all rows have just one."""
        return self.tensors[1]

    @property
    def is_target(self) -> Tensor:
        """Boolean: true for target tokens; or float32: the weight of each target token in the loss, 0 for all other tokens."""
        last = self.tensors[-1]
        assert last is not None
        return last

    def to(self, device: torch.device) -> Micro:
        return Micro(tuple(tensor if tensor is None else tensor.to(device) for tensor in self.tensors))


@dataclass(frozen=True)
class PackedRows:
    """Packed rows as arrays of shape (rows, length); an encoder-decoder's target arrays are (rows, target length)."""

    input_ids: NDArray[Any]
    positions: NDArray[Any]
    segment_ids: NDArray[Any]
    loss_mask: NDArray[Any]  # (rows, target length) for an encoder-decoder
    facts: list[RowFacts]
    target_ids: NDArray[Any] | None = None
    target_positions: NDArray[Any] | None = None
    target_segment_ids: NDArray[Any] | None = None
    weights: list[NDArray[Any]] | None = None  # each row's (examples,): loss weight of an example's target tokens
    reference: list[NDArray[Any]] | None = None  # preferences: each row's (answers,) log-probabilities of the reference
    # On-policy rounds: (rows, length) log-probability of each token under the policy that wrote it (`written`) and under the
    # reference (`held`); and each row's (replies,) advantages and rewards.
    written: NDArray[Any] | None = None
    held: NDArray[Any] | None = None
    advantages: list[NDArray[Any]] | None = None
    rewards: list[NDArray[Any]] | None = None

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> PackedRows:
        """From the pipeline's columns: NumPy arrays or lists with one entry for each row."""
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
        """Number of tokens without padding, on both sides of an encoder-decoder."""
        answers = 0 if self.target_segment_ids is None else int((self.target_segment_ids > 0).sum())
        return int((self.segment_ids > 0).sum()) + answers

    @property
    def targets(self) -> int:
        """Number of target tokens. The first token of a causal row is never one: nothing stands before it."""
        counted = self.loss_mask[:, 1:] if self.target_ids is None else self.loss_mask
        return int((counted > 0).sum())

    @property
    def counted(self) -> float:
        """The loss's denominator: the number of preference pairs or replies, else the sum of the target tokens' weights."""
        if self.reference is not None or self.advantages is not None:
            return sum(len(row.examples) for row in self.facts)
        if self.weights is None:
            return self.targets
        weights = self._target_weights(slice(None)).astype(np.float64)
        return float((weights[:, 1:] if self.target_ids is None else weights).sum())

    def _target_weights(self, rows: slice) -> NDArray[Any]:
        """Loss weight of each token of `rows`: segments [1, 1, 2, 0] with weights [1, 0.1], all targets, give [1, 1, 0.1, 0]."""
        assert self.weights is not None
        segments = self.segment_ids if self.target_segment_ids is None else self.target_segment_ids
        each = [np.append(np.float32(0), row)[places] for row, places in zip(self.weights[rows], segments[rows], strict=True)]
        return np.stack(each).astype(np.float32) * (self.loss_mask[rows] > 0)

    def _targets_of(self, cut: tuple[slice, slice]) -> Tensor:
        """The `is_target` tensor of a micro-batch: boolean, or float32 weights."""
        if self.weights is None:
            return _tensor(self.loss_mask[cut], np.bool_)
        return _tensor(self._target_weights(cut[0])[:, cut[1]], np.float32)

    def micros(self, size: int) -> list[Micro]:
        """Micro-batches of `size` rows (the last may be smaller). Columns at the end that are padding in all rows are cut off."""
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
        """Number of each token's answer, (rows, length), and the `values` of all answers, (answers,).

        Answers are numbered through all rows: segments [1, 1, 2, 2] and [1, 2, 2, 0] give [0, 0, 1, 1] and [2, 3, 3, 1]. The number
        of a padding token means nothing.
        """
        before = np.cumsum([0, *map(len, values)])[:-1]
        return _tensor(self.segment_ids[cut] - 1 + before[:, None]), _joined(values)

    def share(self, rank: int, workers: int) -> PackedRows:
        """This worker's rows: every `workers`-th one, beginning with row `rank`."""
        part = slice(rank, None, workers)
        parts: dict[str, Any] = {name: None if value is None else value[part] for name, value in vars(self).items()}
        return PackedRows(**parts)


def _used(segments: NDArray[Any]) -> slice:
    """Columns up to the last one that is not padding in every row; at least one."""
    columns = np.flatnonzero((segments > 0).any(axis=0))
    return slice(0, int(columns[-1]) + 1 if len(columns) else 1)


def _tensor(array: NDArray[Any], dtype: Any = np.int64) -> Tensor:
    # A copy, because the arrays may be read-only views of shared memory, which torch does not take.
    return torch.from_numpy(array.astype(dtype))


def _table(rows: Any) -> NDArray[Any]:
    return rows if isinstance(rows, np.ndarray) and rows.ndim == 2 else np.stack(list(rows))


def _joined(values: list[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(values).astype(np.float32))


def _ints(values: Sequence[Any]) -> list[int]:
    return [int(value) for value in values]


def micro_batch_rows(rows: int, length: int, budget: int) -> int:
    """Rows in a micro-batch for `micro_batch: auto`: the largest divisor of `rows` with at most `budget` tokens; at least 1.

    `rows` are one worker's packed rows of a step, of `length` tokens each.
    """
    return max(size for size in range(1, rows + 1) if rows % size == 0 and (size == 1 or size * length <= budget))
