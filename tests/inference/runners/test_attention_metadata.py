"""The flat row of a batch: its order, its groups and what each token may see."""

from __future__ import annotations

import torch

from apprentice.inference.kv_cache import KvCache
from apprentice.inference.runners.attention_metadata import AttentionMetadata, DecodeGroup, TokenChunk, group_slots


def test_adjacent_slots_of_one_bucket_are_grouped() -> None:
    assert group_slots([0, 1, 2, 4, 5], [9, 128, 129, 8, 8], context=200) == [
        DecodeGroup(first=0, slot=0, count=2, length=128),
        DecodeGroup(first=2, slot=2, count=1, length=200),
        DecodeGroup(first=3, slot=4, count=2, length=128),
    ]
    assert group_slots([], [], context=200) == []


def test_the_flat_row_has_single_tokens_first_in_order_of_slots() -> None:
    metadata = AttentionMetadata(
        KvCache(4, 16), [TokenChunk(3, 0, [7, 8, 9]), TokenChunk(1, 9, [5]), TokenChunk(0, 5, [4])], torch.device("cpu")
    )
    assert metadata.order == [2, 1, 0]
    assert metadata.ids.tolist() == [4, 5, 7, 8, 9]
    assert metadata.slots.tolist() == [0, 1, 3, 3, 3]
    assert metadata.positions.tolist() == [5, 9, 0, 1, 2]
    assert metadata.logit_places.tolist() == [0, 1, 4]
    assert metadata.logit_rows.tolist() == [2, 1, 0]
    keys = torch.zeros(4, 2, 16, 8)
    mask = metadata.mask(metadata.groups[0], 3, keys)
    assert mask.shape == (2, 2, 1, 16)
    assert (mask[:, 1, 0] == 0).tolist() == [[False] * 3 + [True] * 3 + [False] * 10, [False] * 7 + [True] * 3 + [False] * 6]
    assert metadata.mask(metadata.prefills[0], None, keys) is None
