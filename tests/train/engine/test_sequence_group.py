"""A micro-batch is cut into equal parts: together they have its tokens and targets, and know where its examples are."""

from __future__ import annotations

import pytest
import torch

from apprentice.train.batch import SequencePart, SupervisedBatch
from apprentice.train.engine.sequence_group import SequenceGroup, cut_batch
from tests.train.rows import packed_rows


def batch_of(*, weighted: bool = False) -> SupervisedBatch:
    batch = packed_rows(3, weighted=weighted).micro_batches(3)[0]
    assert isinstance(batch, SupervisedBatch)
    return batch


def joined(batch: SupervisedBatch, size: int) -> tuple[SequencePart, list[SequencePart]]:
    """The parts one after another, and by themselves."""
    parts = [cut_batch(batch, rank, size) for rank in range(size)]
    tables = [torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("input_ids", "positions")]
    tokens = parts[0].input_ids.shape[1]
    places = torch.cat([part.places + rank * tokens for rank, part in enumerate(parts)])
    weights = None if parts[0].weights is None else torch.cat([part.weights for part in parts if part.weights is not None])
    return SequencePart(*tables, places, torch.cat([part.labels for part in parts]), weights, parts[0].bounds), parts


@pytest.mark.parametrize("size", [1, 2, 4, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_parts_are_equal_and_together_all(size: int, weighted: bool) -> None:
    batch = batch_of(weighted=weighted)
    whole, parts = joined(batch, size)
    tokens = batch.input_ids.numel()
    assert len({part.input_ids.shape for part in parts}) == 1
    assert whole.input_ids.shape[1] == -(-tokens // size) * size
    assert torch.equal(whole.input_ids[0, :tokens], batch.input_ids.flatten())
    assert batch.positions is not None
    assert torch.equal(whole.positions[0, :tokens], batch.positions.flatten())
    is_target = batch.is_target[:, 1:] > 0
    assert torch.equal(whole.labels, batch.input_ids[:, 1:][is_target])
    before = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    before[:, :-1] = is_target
    assert torch.equal(whole.places, before.flatten().nonzero()[:, 0])
    assert (whole.weights is not None) == weighted
    if whole.weights is not None:
        assert torch.equal(whole.weights, batch.is_target[:, 1:][is_target])


def test_padding_is_an_example_of_its_own_and_holds_no_target() -> None:
    whole, parts = joined(batch_of(), 4)  # 93 tokens, so that 3 of padding make 24 for each
    assert whole.positions[0, 93:].tolist() == [0, 1, 2]
    assert int(whole.places.max()) < 93
    assert whole.bounds.starts.tolist()[-2:] == [93, 96]
    assert all(torch.equal(part.bounds.starts, whole.bounds.starts) for part in parts)
    begins = (whole.positions[0] == 0).nonzero()[:, 0].tolist()
    assert whole.bounds.starts.tolist() == [*begins, 96]


def test_a_parts_last_token_predicts_the_next_parts_first() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    parts = [cut_batch(SupervisedBatch(ids, None, torch.tensor([[False, False, True, True]])), rank, 2) for rank in range(2)]
    assert [part.places.tolist() for part in parts] == [[1], [0]]
    assert [part.labels.tolist() for part in parts] == [[7], [8]]
    assert [part.positions.tolist() for part in parts] == [[[0, 1]], [[2, 3]]]


def test_a_worker_with_rows_of_its_own_is_in_no_group() -> None:
    assert SequenceGroup.join(1) is None
