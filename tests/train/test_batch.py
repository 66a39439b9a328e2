"""Packed rows: counts, micro-batches without common padding, shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from apprentice.train.batch import (
    PackedRows,
    PreferenceBatch,
    RolloutBatch,
    Seq2SeqBatch,
    SupervisedBatch,
    move_batch,
)
from apprentice.train.engine.deepspeed_config import micro_batch_rows
from tests.train.encoder_decoder_rows import paired_rows
from tests.train.preference_rows import pair_rows
from tests.train.rows import packed_rows, reply_rows


def tiny() -> PackedRows:
    """Row 0 holds examples of 3 and 2 tokens, row 1 one of 2 tokens; a row has 7 places."""
    return PackedRows.from_columns(
        {
            "input_ids": [np.array([5, 6, 7, 8, 9, 0, 0], np.int32), np.array([5, 6, 0, 0, 0, 0, 0], np.int32)],
            "positions": [np.array([0, 1, 2, 0, 1, 0, 1], np.int32), np.array([0, 1, 0, 1, 2, 3, 4], np.int32)],
            "segment_ids": [np.array([1, 1, 1, 2, 2, 0, 0], np.int32), np.array([1, 1, 0, 0, 0, 0, 0], np.int32)],
            "loss_mask": [np.array([0, 1, 1, 0, 1, 0, 0], np.uint8), np.array([0, 1, 0, 0, 0, 0, 0], np.uint8)],
            "window": np.array([3, 3]),
            "row": np.array([4, 5]),
            "examples": [[30, 31], [32]],
            "example_tasks": [[0, 1], [0]],
            "example_targets": [[2, 1], [1]],
            "dropped": ['{"a": {"too_long": 2}}', ""],
        }
    )


def test_no_rows_at_all() -> None:
    names = ("input_ids", "positions", "segment_ids", "loss_mask")
    columns: dict[str, Any] = {name: np.zeros((0, 7), np.int32) for name in names}
    others = ("window", "row", "examples", "example_tasks", "example_targets", "dropped")
    rows = PackedRows.from_columns(columns | {name: [] for name in others})
    assert (len(rows), rows.tokens, rows.targets, rows.micro_batches(2)) == (0, 0, 0, [])


def test_counts_and_facts() -> None:
    rows = tiny()
    assert (len(rows), rows.tokens, rows.targets) == (2, 7, 4)
    assert rows.facts[0] == (3, 4, [30, 31], [0, 1], [2, 1], {"a": {"too_long": 2}}, None)
    assert rows.facts[1].dropped == {}


def test_a_target_in_the_first_place_cannot_be_predicted() -> None:
    rows = tiny()
    rows.loss_mask[0, 0] = 1
    assert rows.targets == 4


def test_micros_leave_out_common_padding() -> None:
    both = tiny().micro_batches(2)
    assert [tuple(micro.input_ids.shape) for micro in both] == [(2, 5)]
    assert both[0].positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert both[0].is_target.dtype == torch.bool
    assert [tuple(micro.input_ids.shape) for micro in tiny().micro_batches(1)] == [(1, 5), (1, 2)]


def test_shares_cover_all_rows_once() -> None:
    rows = packed_rows(5)
    shares = [rows.share(rank, 2) for rank in range(2)]
    assert [[fact.row for fact in share.facts] for share in shares] == [[0, 2, 4], [1, 3]]
    assert sum(share.targets for share in shares) == rows.targets > 0


@pytest.mark.parametrize(
    ("rows", "length", "budget", "expected"),
    [(4, 1024, 2048, 2), (6, 100, 300, 3), (5, 100, 300, 1), (4, 4096, 2048, 1), (8, 1, 99, 8)],
)
def test_automatic_micro_batch(rows: int, length: int, budget: int, expected: int) -> None:
    assert micro_batch_rows(rows, length, budget) == expected


def test_weights_of_examples_are_those_of_their_targets() -> None:
    rows = replace(tiny(), weights=[np.array([1.0, 0.5], np.float32), np.array([0.25], np.float32)])
    micro = rows.micro_batches(2)[0]
    assert micro.is_target.tolist() == [[0, 1, 1, 0, 0.5], [0, 0.25, 0, 0, 0]]
    assert (rows.targets, rows.loss_denominator) == (4, 2.75)
    assert rows.share(1, 2).micro_batches(1)[0].is_target.tolist() == [[0, 0.25]]


def test_an_encoder_decoders_tensors_are_known_by_name() -> None:
    rows = paired_rows(2)
    [batch] = rows.micro_batches(2)
    assert isinstance(batch, Seq2SeqBatch)
    for name, array in (("segment_ids", rows.segment_ids), ("target_positions", rows.target_positions)):
        tensor = getattr(batch, name)
        assert array is not None
        assert tensor.tolist() == array[:, : tensor.shape[1]].tolist()
    assert not hasattr(batch, "positions")  # those of its prompts are not needed


@pytest.mark.parametrize(
    ("rows", "kind"), [(pair_rows(2), PreferenceBatch), (reply_rows(2), RolloutBatch), (tiny(), SupervisedBatch)]
)
def test_every_objective_has_its_own_batch(rows: PackedRows, kind: type) -> None:
    [batch] = rows.micro_batches(len(rows))
    assert isinstance(batch, kind)
    moved = move_batch(batch, torch.device("meta"))
    assert type(moved) is kind
    kept = [(before, after) for before, after in zip(batch, moved, strict=True) if before is not None]
    assert [after.shape for _, after in kept] == [before.shape for before, _ in kept]
    assert {after.device.type for _, after in kept} == {"meta"}


def test_a_batch_may_have_no_positions() -> None:
    [_, alone] = tiny().micro_batches(1)
    assert isinstance(alone, SupervisedBatch)
    assert alone.positions is None
    assert move_batch(alone, torch.device("meta")).positions is None
