"""FLOPs of packed rows as PyTorch counts them, against arithmetic."""

from __future__ import annotations

import pytest

from benchmarks.training.flop_counts import (
    SHORTEST,
    LlamaShape,
    attention_flops,
    causal_pairs,
    count_flops,
    example_lengths,
)

SHAPE = LlamaShape(64, 96, 2, 4, 2, 100)


def test_counts_are_the_products() -> None:
    rows = [[10, 30, 24], [64]]
    flops = count_flops(SHAPE, rows)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96  # queries and output, keys and values of half as many heads, the MLP
    assert flops.linear == 6 * 128 * (2 * layer + 64 * 100)
    assert flops.dense == attention_flops(SHAPE, 2 * 64**2)
    assert flops.per_segment == attention_flops(SHAPE, 10**2 + 30**2 + 24**2 + 64**2)
    assert flops.causal == attention_flops(SHAPE, 55 + 465 + 300 + 2080)


def test_pairs() -> None:
    assert causal_pairs([[1, 3], [2]]) == 1 + 6 + 3


@pytest.mark.parametrize("mean", [64, 512, 4096])
def test_lengths_fill_the_rows(mean: int) -> None:
    rows = example_lengths(20, 4096, mean, seed=1)
    assert {sum(row) for row in rows} == {4096}
    assert min(size for row in rows for size in row) >= SHORTEST
    assert rows == example_lengths(20, 4096, mean, seed=1)
    sizes = [size for row in rows for size in row]
    assert sum(sizes) / len(sizes) == pytest.approx(mean, rel=0.3)
