"""Batches: packed rows as NumPy arrays from the data pipeline, and micro-batches of tensors for one forward pass.

Two examples of 3 and 2 tokens in a row of 6, each with one answer token, and in a second row one of 2:

    input_ids    a a b c d 0 | e f 0 0 0 0
    positions    0 1 2 0 1 0 | 0 1 0 1 2 3      restart at 0 with each example and with the padding
    segment_ids  1 1 1 2 2 0 | 1 1 0 0 0 0      number of the example in its row; 0 is padding
    loss_mask    0 0 1 0 1 0 | 0 1 0 0 0 0      1 on target tokens

`PackedRows(…).micro_batches(2)` gives one `SupervisedBatch` of shape (2, 5), without the last column, padding in both rows; its
`is_target` is `loss_mask` as booleans. If the examples were answers, the first row would be a pair, in a `PreferenceBatch` with

    answers      0 0 0 1 1        0 is the better answer of the first pair, 1 the worse one

and `places`, where the targets lie in the rows laid end to end, is [2 4 6]: (0, 2), (0, 4) and (1, 1). The loss of a target is
computed at its own place in an encoder-decoder's answers, and one place before it in a causal model.

The columns are described in `apprentice.data.row_columns`. What the host must know of a batch is found before it goes to a GPU,
since asking there would wait for all that is queued.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apprentice.data.packing import select_answers, used_columns
from apprentice.train.sequence_bounds import ExampleSizes, SequenceBounds, copy_to


class RowFacts(NamedTuple):
    """Bookkeeping of one packed row: its place in the stream and the examples in it."""

    window: int
    row: int
    examples: list[int]  # their positions in the sampling plan
    tasks: list[int]  # each example's task number
    targets: list[int]  # each example's number of target tokens
    dropped: dict[str, dict[str, int]]  # for the whole window, on its first row only: task → reason → count
    window_rows: int | None = None  # rows in the window; None where every window has the same number


class SupervisedBatch(NamedTuple):
    """Micro-batch of objective `sft` for a causal model; all tensors are (rows, length).

    `positions` restart with each example of a row; they are None where each row has just one. `is_target` is boolean, or float32
    where examples weigh differently: the weight of each target token in the loss, 0 for other tokens. `bounds` are those of the
    sequences that `positions` tell apart, `places` those of the targets, int64 (targets,). Without them a loss finds them itself,
    for which the host waits. So in the other types.
    """

    input_ids: Tensor
    positions: Tensor | None
    is_target: Tensor
    bounds: SequenceBounds | None = None
    places: Tensor | None = None
    teacher_ids: Tensor | None = None  # for `distill`: a teacher's likeliest tokens at each target, (targets, k)
    teacher_log_probs: Tensor | None = None  # (targets, k + 1): theirs, and that of all others


class SequencePart(NamedTuple):
    """One worker's part of a `SupervisedBatch` that several workers share: `input_ids` and `positions` are (1, its tokens).

    `places` (targets,) are those of its tokens that predict a target, `labels` and `weights` (targets,) those targets and, where
    examples weigh differently, their weights in the loss. `bounds` are those of the whole micro-batch laid end to end.
    """

    input_ids: Tensor
    positions: Tensor
    places: Tensor
    labels: Tensor
    weights: Tensor | None
    bounds: SequenceBounds


class Seq2SeqBatch(NamedTuple):
    """Micro-batch of objective `sft` for an encoder-decoder: prompts (rows, length), the others (rows, target length).

    Segments number the examples of a row on both sides; 0 is padding. `target_ids` are the labels, not shifted; `is_target` is as
    in `SupervisedBatch`.
    """

    input_ids: Tensor
    segment_ids: Tensor
    target_ids: Tensor
    target_positions: Tensor
    target_segment_ids: Tensor
    is_target: Tensor
    sizes: ExampleSizes | None = None
    places: Tensor | None = None


class PreferenceBatch(NamedTuple):
    """Micro-batch of objectives `dpo` and `reward`; tensors are (rows, length), but `reference`.

    `answers` numbers each token's answer: 2p for the better and 2p + 1 for the worse answer of pair p. `reference` has the
    log-probability of each answer under the reference model, float32 (answers,); for `reward`, which has no such model, zeros.
    """

    input_ids: Tensor
    positions: Tensor
    answers: Tensor
    reference: Tensor
    is_target: Tensor
    bounds: SequenceBounds | None = None
    places: Tensor | None = None


class LabelledBatch(NamedTuple):
    """Micro-batch of objective `kto`: as a `PreferenceBatch`, but with one answer an example.

    `desirable` (answers,) are labels, boolean; `baseline` () is the divergence from the reference to compare with, in nats.
    """

    input_ids: Tensor
    positions: Tensor
    answers: Tensor
    reference: Tensor
    desirable: Tensor
    baseline: Tensor
    is_target: Tensor
    bounds: SequenceBounds | None = None
    places: Tensor | None = None


class RolloutBatch(NamedTuple):
    """Micro-batch of objective `grpo`; tensors are (rows, length), but `advantages` and `rewards`, float32 (replies,).

    `replies` numbers each token's reply. `policy_log_probs` and `reference_log_probs` are each token's log-probabilities under the
    policy that wrote it and under the reference model, float32.
    """

    input_ids: Tensor
    positions: Tensor
    replies: Tensor
    policy_log_probs: Tensor
    reference_log_probs: Tensor
    advantages: Tensor
    rewards: Tensor
    is_target: Tensor
    bounds: SequenceBounds | None = None
    places: Tensor | None = None


MicroBatch = SupervisedBatch | SequencePart | Seq2SeqBatch | PreferenceBatch | LabelledBatch | RolloutBatch
AnyMicroBatch = TypeVar("AnyMicroBatch", bound=MicroBatch)


def move_batch(batch: AnyMicroBatch, device: torch.device) -> AnyMicroBatch:
    """`batch` with its tensors on `device`."""

    def moved(field: Any) -> Any:
        return copy_to(field, device) if isinstance(field, Tensor) else field if field is None else field.to(device)

    return type(batch)(**{name: moved(field) for name, field in batch._asdict().items()})


def target_places(batch: SupervisedBatch | Seq2SeqBatch | PreferenceBatch | LabelledBatch | RolloutBatch) -> Tensor:
    """Places of the targets of `batch` in its rows laid end to end, (targets,). The first token of a causal row is none."""
    if batch.places is not None:
        return batch.places
    is_target = batch.is_target > 0
    if not isinstance(batch, Seq2SeqBatch):
        is_target = torch.cat([torch.zeros_like(is_target[:, :1]), is_target[:, 1:]], dim=1)
    return is_target.flatten().nonzero()[:, 0]


# Fields of `PackedRows` and the pipeline's columns: arrays of one shape for all rows, and arrays that differ in length.
_SIDES = ("target_ids", "target_positions", "target_segment_ids")
_TABLES = {name: name for name in ("input_ids", "positions", "segment_ids", "loss_mask", *_SIDES)} | {
    "policy_log_probs": "written",
    "reference_log_probs": "held",
}
_BY_EXAMPLE = ("reference", "desirable", "advantages", "rewards", "teacher_ids", "teacher_log_probs")
_RAGGED = {"weights": "example_weights"} | {name: name for name in _BY_EXAMPLE}


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
    teacher_ids: list[NDArray[Any]] | None = None  # each row's (targets, k), laid end to end
    teacher_log_probs: list[NDArray[Any]] | None = None  # each row's (targets, k + 1), likewise
    desirable: list[NDArray[Any]] | None = None  # labelled answers: each row's (examples,) labels
    # On-policy rounds: (rows, length) log-probability of each token under the policy that wrote it and under the reference model;
    # and each row's (replies,) advantages and rewards.
    policy_log_probs: NDArray[Any] | None = None
    reference_log_probs: NDArray[Any] | None = None
    advantages: list[NDArray[Any]] | None = None
    rewards: list[NDArray[Any]] | None = None

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> PackedRows:
        """From the pipeline's columns: NumPy arrays or lists with one entry for each row."""
        tables = {name: _stack(columns[column]) for name, column in _TABLES.items() if column in columns}
        ragged = {name: [np.asarray(row) for row in columns[column]] for name, column in _RAGGED.items() if column in columns}
        names = ("window", "row", "examples", "example_tasks", "example_targets", "dropped")
        facts = [
            RowFacts(
                int(window), int(row), [*map(int, examples)], [*map(int, tasks)], [*map(int, targets)], json.loads(dropped or "{}")
            )
            for window, row, examples, tasks, targets, dropped in zip(*(columns[name] for name in names), strict=True)
        ]
        if "window_rows" in columns:
            facts = [fact._replace(window_rows=int(rows)) for fact, rows in zip(facts, columns["window_rows"], strict=True)]
        fields: dict[str, Any] = {**tables, **ragged}
        return cls(**fields, facts=facts)

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
    def loss_denominator(self) -> float:
        """What the summed loss is divided by: the number of preference pairs or replies, else the sum of the targets' weights."""
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
        by_row = [np.append(np.float32(0), row)[places] for row, places in zip(self.weights[rows], segments[rows], strict=True)]
        return np.stack(by_row).astype(np.float32) * (self.loss_mask[rows] > 0)

    def _is_target(self, cut: tuple[slice, slice]) -> Tensor:
        """The `is_target` tensor of a micro-batch: boolean, or float32 weights."""
        if self.weights is None:
            return _tensor(self.loss_mask[cut], np.bool_)
        return _tensor(self._target_weights(cut[0])[:, cut[1]], np.float32)

    def _places(self, cut: tuple[slice, slice]) -> Tensor:
        """The `places` of a micro-batch."""
        is_target = self.loss_mask[cut] > 0
        if self.weights is not None:
            is_target &= self._target_weights(cut[0])[:, cut[1]] > 0
        if self.target_ids is None:
            is_target = is_target.copy()
            is_target[:, 0] = False
        return torch.from_numpy(np.flatnonzero(is_target))

    def micro_batches(self, size: int, lengths: int | None = None) -> list[MicroBatch]:
        """Micro-batches of `size` rows (the last may be smaller). Columns at the end that are padding in all rows are cut off.

        With `lengths`, for compiled causal models, the rest has one of that many lengths, and bounds have one of a few shapes. Of
        labelled answers only they are in the batches, and not the other rows' answers beside them.
        """
        rows = self if self.desirable is None else self._one_of_two(0)
        return [rows._batch(slice(start, start + size), lengths) for start in range(0, len(rows), size)]

    def mismatched_batches(self, size: int, lengths: int | None = None) -> list[MicroBatch]:
        """As `micro_batches`, with the other rows' answers that stand beside labelled ones."""
        return replace(self._one_of_two(1), desirable=None).micro_batches(size, lengths)

    def _one_of_two(self, side: int) -> PackedRows:
        """The rows with the first (0) or the second (1) answer of each example, moved to the left of the row."""
        assert self.reference is not None
        names = ("input_ids", "positions", "segment_ids", "loss_mask")
        tables: dict[str, Any] = select_answers({name: getattr(self, name) for name in names}, side)
        return replace(self, **tables, reference=[values[side::2] for values in self.reference])

    def _batch(self, rows: slice, lengths: int | None) -> MicroBatch:
        batch = self._cut_batch((rows, used_columns(self.segment_ids[rows], lengths)))
        if lengths is None or isinstance(batch, Seq2SeqBatch) or batch.bounds is None:
            return batch
        return batch._replace(bounds=batch.bounds.padded(batch.input_ids.shape[1]))

    def _cut_batch(self, cut: tuple[slice, slice]) -> MicroBatch:
        rows = cut[0]
        if self.target_ids is not None:
            return self._seq2seq(cut)
        if self.desirable is not None:
            return self._labelled(cut, self.desirable[rows])
        if self.reference is not None:
            return self._pairs(cut)
        if self.reference_log_probs is not None:
            return self._replies(cut)
        ids, is_target, places = _tensor(self.input_ids[cut]), self._is_target(cut), self._places(cut)
        one_example = int(self.segment_ids[rows].max(initial=0)) <= 1
        teacher: tuple[Tensor, ...] = ()
        if self.teacher_ids is not None and self.teacher_log_probs is not None:
            tables = (_concatenate(self.teacher_ids[rows]).long(), _concatenate(self.teacher_log_probs[rows]))
            teacher = tuple(table.view(len(places), -1) if len(places) else table[:, None] for table in tables)
        if one_example:
            return SupervisedBatch(ids, None, is_target, None, places, *teacher)
        positions = self.positions[cut]
        return SupervisedBatch(ids, _tensor(positions), is_target, SequenceBounds.of(positions), places, *teacher)

    def _seq2seq(self, cut: tuple[slice, slice]) -> Seq2SeqBatch:
        assert self.target_ids is not None
        assert self.target_positions is not None
        assert self.target_segment_ids is not None
        answers = (cut[0], used_columns(self.target_segment_ids[cut[0]]))
        return Seq2SeqBatch(
            input_ids=_tensor(self.input_ids[cut]),
            segment_ids=_tensor(self.segment_ids[cut]),
            target_ids=_tensor(self.target_ids[answers]),
            target_positions=_tensor(self.target_positions[answers]),
            target_segment_ids=_tensor(self.target_segment_ids[answers]),
            is_target=self._is_target(answers),
            sizes=ExampleSizes.of(self.segment_ids[cut], self.target_segment_ids[answers]),
            places=self._places(answers),
        )

    def _pairs(self, cut: tuple[slice, slice]) -> PreferenceBatch:
        assert self.reference is not None
        reference = self.reference[cut[0]]
        return PreferenceBatch(
            input_ids=_tensor(self.input_ids[cut]),
            positions=_tensor(self.positions[cut]),
            answers=self._numbers(cut, reference),
            reference=_concatenate(reference),
            is_target=_tensor(self.loss_mask[cut], np.bool_),
            bounds=SequenceBounds.of(self.positions[cut]),
            places=self._places(cut),
        )

    def _labelled(self, cut: tuple[slice, slice], desirable: list[NDArray[Any]]) -> LabelledBatch:
        answers = self._pairs(cut)._asdict()
        labels = torch.from_numpy(np.concatenate(desirable).astype(np.bool_))
        return LabelledBatch(**answers, desirable=labels, baseline=torch.zeros(()))

    def _replies(self, cut: tuple[slice, slice]) -> RolloutBatch:
        assert self.policy_log_probs is not None
        assert self.reference_log_probs is not None
        assert self.advantages is not None
        assert self.rewards is not None
        advantages = self.advantages[cut[0]]
        return RolloutBatch(
            input_ids=_tensor(self.input_ids[cut]),
            positions=_tensor(self.positions[cut]),
            replies=self._numbers(cut, advantages),
            policy_log_probs=_tensor(self.policy_log_probs[cut], np.float32),
            reference_log_probs=_tensor(self.reference_log_probs[cut], np.float32),
            advantages=_concatenate(advantages),
            rewards=_concatenate(self.rewards[cut[0]]),
            is_target=_tensor(self.loss_mask[cut], np.bool_),
            bounds=SequenceBounds.of(self.positions[cut]),
            places=self._places(cut),
        )

    def _numbers(self, cut: tuple[slice, slice], values: list[NDArray[Any]]) -> Tensor:
        """Number of each token's answer, (rows, length), where `values` has each row's (answers,) values.

        Answers are numbered through all rows: segments [1, 1, 2, 2] and [1, 2, 2, 0] give [0, 0, 1, 1] and [2, 3, 3, 1]. The number
        of a padding token means nothing.
        """
        before = np.cumsum([0, *map(len, values)])[:-1]
        return _tensor(self.segment_ids[cut] - 1 + before[:, None])

    def share(self, rank: int, workers: int) -> PackedRows:
        """This worker's rows: every `workers`-th one, beginning with row `rank`."""
        part = slice(rank, None, workers)
        parts: dict[str, Any] = {name: None if value is None else value[part] for name, value in vars(self).items()}
        return PackedRows(**parts)


def _tensor(array: NDArray[Any], dtype: Any = np.int64) -> Tensor:
    # A copy, because the arrays may be read-only views of shared memory, which torch does not take.
    return torch.from_numpy(array.astype(dtype))


def _stack(rows: Any) -> NDArray[Any]:
    return rows if isinstance(rows, np.ndarray) and rows.ndim == 2 else np.stack(list(rows))


def _concatenate(values: list[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(values).astype(np.float32))
