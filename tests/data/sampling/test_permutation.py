"""Keys, draws and permutations: exact where they must be, even where they must be random."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.data.sampling.permutation import below, draw, key_of, permute

KEYS = st.integers(0, 2**64 - 1)


def test_keys_and_draws_are_the_same_in_every_process() -> None:
    assert key_of(17, "sst2", "order") == 2976527198578760805
    assert permute(np.arange(10), 10, 7).tolist() == [2, 7, 1, 3, 8, 0, 6, 9, 4, 5]
    assert key_of(1, "23") != key_of(12, "3")
    assert draw(key_of(17, "format"), np.arange(3)).tolist() == [8355128236080566624, 12441013216497642587, 16481013209176401722]


@settings(deadline=None)
@given(size=st.integers(1, 3000), key=KEYS)
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 2**50), min_size=1, max_size=50), key=KEYS, data=st.data())
def test_permute_does_each_element_by_itself(sizes: list[int], key: int, data: st.DataObject) -> None:
    indices = [data.draw(st.integers(0, size - 1)) for size in sizes]
    keys = draw(key, np.arange(len(sizes)))
    together = permute(np.array(indices), np.array(sizes), keys).tolist()
    alone = [int(permute(np.array([i]), n, int(k))[0]) for i, n, k in zip(indices, sizes, keys, strict=True)]
    assert together == alone
    assert all(0 <= place < size for place, size in zip(together, sizes, strict=True))


def test_permute_keeps_shapes_and_takes_nothing() -> None:
    assert permute(np.arange(6).reshape(2, 3), np.array([[7], [9]]), 5).shape == (2, 3)
    assert permute(np.arange(0), 1, 5).shape == (0,)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_permutation_is_about_equally_likely(size: int) -> None:
    keys = draw(3, np.arange(6000))
    places = permute(np.broadcast_to(np.arange(size), (6000, size)), size, keys[:, None])
    expected = 6000 / len(list(permutations(range(size))))
    counts = [int((places == order).all(axis=1).sum()) for order in permutations(range(size))]
    assert sum(counts) == 6000
    assert all(abs(count - expected) < 6 * expected**0.5 for count in counts), counts


def test_neighbours_are_scattered() -> None:
    places = permute(np.arange(10_000), 10_000, 11)
    assert abs(np.corrcoef(np.arange(10_000), places)[0, 1]) < 0.05
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    assert 0.02 < (np.abs(np.diff(places)) < 200).mean() < 0.06  # 4% of random pairs are that close


def test_draws_are_even_and_independent() -> None:
    first, second = below(draw(1, np.arange(40_000)), 4), below(draw(2, np.arange(40_000)), 4)
    table = np.bincount(first * 4 + second, minlength=16)
    assert table.sum() == 40_000
    assert (abs(table - 2500) < 6 * 50).all(), table
