"""Size and memory of the KV cache: what a limit in bytes leaves, and that freed memory is fresh."""

from __future__ import annotations

import pytest
import torch

from apprentice.errors import ModelError
from apprentice.inference.kv_cache import KvCache, KvCacheSize, positions_within


def test_bytes_become_positions() -> None:
    assert positions_within(None, 100, slots=4, context=50) == 200
    assert positions_within(12_345, 100, slots=4, context=50) == 123
    assert positions_within(10**9, 100, slots=4, context=50) == 200
    with pytest.raises(ModelError, match="room for 1 tokens of 100 bytes each"):
        positions_within(199, 100, slots=4, context=50)


def test_both_sides_of_an_encoder_decoder_fit_into_the_limit() -> None:
    """200 bytes a position on both sides together: 123 of them, in slots of 50, leave two whole slots on a GPU."""
    sizes = [KvCacheSize.within(24_690, 200, slots=4, context=50, on_cpu=on_cpu, sides=2) for on_cpu in (True, False)]
    assert sizes == [KvCacheSize(4, 50, 246), KvCacheSize(2, 50, 246)]
    for size in sizes:
        assert size.positions * 100 <= 24_690
    assert sizes[1].slots * 2 * sizes[1].context * 100 <= 24_690
    assert KvCacheSize.within(None, 200, slots=4, context=50, on_cpu=False, sides=2) == KvCacheSize(4, 50, 400)
    assert KvCacheSize.within(6_000, 200, slots=4, context=50, on_cpu=True, sides=2) == KvCacheSize(4, 30, 60)


def test_memory_that_is_given_back_is_fresh() -> None:
    memory = KvCache(slots=3, context=256)
    filled = torch.ones(3 * 256, 2, 8)
    keys, values = memory.write(0, filled, filled, torch.arange(3).repeat_interleave(256), torch.arange(256).repeat(3))
    assert memory.position_bytes == 2 * 2 * 8 * 4
    memory.free(1)
    for part in (keys, values):
        assert [float(part[slot].sum()) for slot in range(3)] == [4096.0, 0.0, 4096.0]
