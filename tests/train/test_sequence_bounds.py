"""Bounds of sequences, made on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from deepspeed.runtime.zero.utils import apply_to_tensors_only

from apprentice.train.batch import PreferenceBatch, RolloutBatch, SupervisedBatch, move_batch
from apprentice.train.sequence_bounds import ExampleSizes, SequenceBounds, copy_to
from tests.train.preference_rows import pair_rows
from tests.train.rows import packed_rows, reply_rows


def test_bounds() -> None:
    bounds = SequenceBounds.of(np.array([[0, 1, 2, 0], [0, 1, 0, 1]]))
    assert (bounds.starts.tolist(), bounds.longest) == ([0, 3, 4, 6, 8], 3)
    assert bounds.starts.dtype == torch.int32
    assert bounds.keywords() == {
        "cu_seq_lens_q": bounds.starts,
        "cu_seq_lens_k": bounds.starts,
        "max_length_q": 3,
        "max_length_k": 3,
    }


def test_rows_of_one_sequence() -> None:
    bounds = SequenceBounds.of_rows(torch.zeros(3, 5, dtype=torch.long))
    assert (bounds.starts.tolist(), bounds.longest) == ([0, 5, 10, 15], 5)
    assert bounds.starts.dtype == torch.int32


def test_deepspeed_goes_through_them_without_a_warning() -> None:
    bounds, warnings = SequenceBounds.of(np.array([[0, 1, 0]])), list[str]()
    doubled = apply_to_tensors_only(lambda tensor: tensor * 2, (bounds,), warning_msg_fn=lambda value: warnings.append(str(value)))
    assert doubled[0].starts.tolist() == [0, 4, 6]
    assert doubled[0].longest == 2
    assert not warnings


def test_every_batch_of_packed_rows_brings_them() -> None:
    for rows, kind in ((packed_rows(2), SupervisedBatch), (pair_rows(2), PreferenceBatch), (reply_rows(2), RolloutBatch)):
        [batch] = rows.micro_batches(2)
        assert isinstance(batch, kind)
        assert batch.bounds is not None
        assert batch.positions is not None
        expected = SequenceBounds.of(batch.positions.numpy())
        assert (batch.bounds.starts.tolist(), batch.bounds.longest) == (expected.starts.tolist(), expected.longest)
        moved = move_batch(batch, torch.device("meta"))
        assert moved.bounds is not None
        assert (moved.bounds.device.type, moved.bounds.longest) == ("meta", expected.longest)


def test_padded_bounds_have_few_shapes_and_the_same_sequences() -> None:
    bounds = SequenceBounds.of(np.array([[0, 1, 2, 0], [0, 1, 0, 1], [0, 1, 2, 3]])).padded(4)
    assert (bounds.starts.tolist(), bounds.longest) == ([0, 3, 4, 6, 8, 12, 12, 12, 12], 4)
    assert bounds.starts.dtype == torch.int32
    shapes = {len(SequenceBounds.of(np.arange(size)[:, None] * 0).padded(1).starts) for size in range(1, 33)}
    assert shapes == {2, 3, 5, 9, 17, 33}


def test_rows_are_cut_to_few_lengths() -> None:
    lengths = set()
    for seed in range(20):
        [batch] = packed_rows(1, seed).micro_batches(1, 4)
        [short] = packed_rows(1, seed).micro_batches(1)
        assert batch.input_ids.shape[1] >= short.input_ids.shape[1]
        lengths.add(batch.input_ids.shape[1])
    assert lengths <= {12, 24, 36, 48}
    assert len(lengths) > 1


def test_sizes_of_both_sides() -> None:
    sizes = ExampleSizes.of(np.array([[1, 1, 2, 0], [1, 1, 1, 1]]), np.array([[1, 2, 2, 0, 0], [1, 0, 0, 0, 0]]))
    assert sizes == (((2, 1, 1), (4, 0)), ((1, 2, 2), (1, 4)))
    assert sizes.is_packed
    assert not ExampleSizes.of_one_example(torch.zeros(2, 3), torch.zeros(2, 1)).is_packed


def test_copies_to_a_gpu_are_queued_from_pinned_memory() -> None:
    calls: list[tuple[str, Any]] = []

    class Recorded(torch.Tensor):
        def pin_memory(self, *_: Any) -> Any:
            calls.append(("pin", None))
            return self

        def to(self, *arguments: Any, **keywords: Any) -> Any:
            calls.append(("to", (*arguments, keywords)))
            return self

    numbers = torch.zeros(3).as_subclass(Recorded)
    copy_to(numbers, torch.device("cuda"))
    assert calls == [("pin", None), ("to", (torch.device("cuda"), {"non_blocking": True}))]
    calls.clear()
    copy_to(numbers, torch.device("cpu"))
    assert calls == [("to", (torch.device("cpu"), {}))]
