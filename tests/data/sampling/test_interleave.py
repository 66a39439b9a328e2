"""The rotation: closed-form counts equal to counting, and never 2 away from the share."""

from __future__ import annotations

import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.data.sampling.interleave import MAX_TOTAL, WeightedInterleave

WEIGHTS = st.one_of(
    st.lists(st.integers(1, 1000), min_size=1, max_size=40),
    st.lists(st.integers(0, 24).map(lambda power: 2**power), min_size=1, max_size=40),  # deep trees
)


def largest_error(rotation: WeightedInterleave, position: int) -> Fraction:
    total = sum(rotation.weights)
    shares = enumerate(rotation.weights)
    return max(abs(rotation.count(leaf, position) - Fraction(weight * position, total)) for leaf, weight in shares)


def test_the_order_of_small_weights() -> None:
    assert WeightedInterleave([1]).assign(np.arange(3))[0].tolist() == [0, 0, 0]
    assert WeightedInterleave([1, 1]).assign(np.arange(4))[0].tolist() == [0, 1, 0, 1]
    leaves, counts = WeightedInterleave([1, 3]).assign(np.arange(8))
    assert leaves.tolist() == [1, 0, 1, 1, 1, 0, 1, 1]
    assert counts.tolist() == [0, 0, 1, 2, 3, 1, 4, 5]


@settings(deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, 10**12), stop=st.integers(1, 300))
def test_counts_are_what_counting_gives(weights: list[int], start: int, stop: int) -> None:
    rotation = WeightedInterleave(weights)
    leaves, counts = rotation.assign(np.arange(start, start + stop))
    seen = [rotation.count(leaf, start) for leaf in range(len(weights))]
    for leaf, count in zip(leaves.tolist(), counts.tolist(), strict=True):
        assert count == seen[leaf]
        seen[leaf] += 1
    assert seen == [rotation.count(leaf, start + stop) for leaf in range(len(weights))]
    assert sum(seen) == start + stop


@settings(deadline=None)
@given(weights=WEIGHTS, position=st.integers(0, 10**12))
def test_no_count_is_two_from_its_share(weights: list[int], position: int) -> None:
    assert largest_error(WeightedInterleave(weights), position) < Fraction(17, 10)


@pytest.mark.parametrize("position", [1, 9_999, 10**6 + 7, 10**12, 10**12 + 12_345])
@pytest.mark.parametrize("kind", ["equal", "random", "fibonacci", "steep"])
def test_ten_thousand_weights(kind: str, position: int) -> None:
    golden = [1, 1]
    while sum(golden) < MAX_TOTAL // 4:
        golden.append(golden[-1] + golden[-2])
    numbers = np.random.default_rng(3).integers(1, 100_000, 10_000).tolist()
    weights = {
        "equal": [1] * 10_000,
        "random": numbers,
        "fibonacci": golden + [1] * (10_000 - len(golden)),
        "steep": [MAX_TOTAL - 9_999] + [1] * 9_999,
    }[kind]
    assert len(weights) == 10_000
    assert largest_error(WeightedInterleave(weights), position) < Fraction(17, 10)


def test_a_rotation_is_small_and_stays_itself_when_pickled() -> None:
    rotation = WeightedInterleave(range(1, 1001))
    again = pickle.loads(pickle.dumps(rotation))
    assert len(pickle.dumps(rotation)) < 5_000
    assert again.assign(np.arange(500))[0].tolist() == rotation.assign(np.arange(500))[0].tolist()


@pytest.mark.parametrize("weights", [[], [0, 1], [MAX_TOTAL, 1]])
def test_weights_that_it_cannot_deal_to_are_refused(weights: list[int]) -> None:
    with pytest.raises(ValueError, match="positive integers"):
        WeightedInterleave(weights)
