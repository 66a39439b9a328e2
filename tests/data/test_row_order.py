"""The order of rows: a permutation in every pass, and few row groups at a time."""

from __future__ import annotations

import pickle

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from apprentice.data.permutation import Numbers, permute
from apprentice.data.row_order import SHELF_GROUPS, RowOrder


def drawn(order: RowOrder, start: int, stop: int) -> Numbers:
    counts = np.arange(start, stop)
    span = order.spans(counts)
    return order.rows(counts, span.starts + permute(span.within, span.sizes, span.keys))


def make(group_rows: list[int], kept_share: float = 1.0, seed: int = 0) -> RowOrder:
    total = sum(group_rows)
    kept = np.flatnonzero(np.random.default_rng(seed).random(total) < kept_share)
    kept = kept if len(kept) else np.array([total - 1])
    return RowOrder(seed, kept, np.array(group_rows))


@given(
    group_rows=st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any),
    kept_share=st.sampled_from([0.1, 0.9, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    pass_=st.sampled_from([0, 1, 10**9]),
)
def test_every_pass_has_each_row_once(group_rows: list[int], kept_share: float, seed: int, pass_: int) -> None:
    order = make(group_rows, kept_share, seed)
    size = len(order)
    rows = drawn(order, pass_ * size, (pass_ + 1) * size)
    assert sorted(rows.tolist()) == order.kept.tolist()


@given(start=st.integers(0, 1500), stop=st.integers(0, 1500))
def test_any_stretch_is_the_same_by_itself(start: int, stop: int) -> None:
    order = make([50] * 20, 0.5)
    assert drawn(order, start, start + stop).tolist() == drawn(order, 0, 3000)[start : start + stop].tolist()


def test_passes_differ() -> None:
    order = make([100] * 20)
    first, second = drawn(order, 0, 2000), drawn(order, 2000, 4000)
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(first, np.arange(2000))[0, 1]) < 0.5  # groups of a sorted source are shuffled too


def test_a_stretch_of_the_order_reads_few_row_groups() -> None:
    order = make([1000] * 500)
    for start in (0, 7_500, 123_456, 10**9):
        groups = set((drawn(order, start, start + 1000) // 1000).tolist())
        assert 2 <= len(groups) <= 2 * SHELF_GROUPS


def test_a_pickled_order_is_the_same() -> None:
    order = make([10] * 30)
    drawn(order, 0, 10)
    assert drawn(pickle.loads(pickle.dumps(order)), 0, 900).tolist() == drawn(order, 0, 900).tolist()
