"""The order of rows: a permutation in every pass, and few row groups at a time."""

from __future__ import annotations

import pickle

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.data.sampling.permutation import Numbers
from apprentice.data.sampling.shuffle import BUFFER_GROUPS, RowOrder, draw_rows


def rows(order: RowOrder, start: int, stop: int) -> Numbers:
    drawn, passes = draw_rows([order], np.zeros(stop - start, dtype=np.int64), np.arange(start, stop))
    assert passes.tolist() == [count // len(order) for count in range(start, stop)]
    return drawn


def make(group_rows: list[int], kept_share: float = 1.0, seed: int = 0) -> RowOrder:
    total = sum(group_rows)
    kept = np.flatnonzero(np.random.default_rng(seed).random(total) < kept_share)
    kept = kept if len(kept) else np.array([total - 1])
    return RowOrder(seed, kept, np.array(group_rows))


@settings(deadline=None)
@given(
    group_rows=st.lists(st.integers(0, 12), min_size=1, max_size=30).filter(any),
    kept_share=st.sampled_from([0.1, 0.9, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    pass_=st.sampled_from([0, 1, 10**9]),
)
def test_every_pass_has_each_row_once(group_rows: list[int], kept_share: float, seed: int, pass_: int) -> None:
    order = make(group_rows, kept_share, seed)
    size = len(order)
    drawn = rows(order, pass_ * size, (pass_ + 1) * size)
    assert sorted(drawn.tolist()) == order.kept[:].tolist()


@settings(deadline=None)
@given(start=st.integers(0, 1500), stop=st.integers(0, 1500))
def test_any_stretch_is_the_same_by_itself(start: int, stop: int) -> None:
    order = make([50] * 20, 0.5)
    assert rows(order, start, start + stop).tolist() == rows(order, 0, 3000)[start : start + stop].tolist()


def test_passes_differ() -> None:
    order = make([100] * 20)
    first, second = rows(order, 0, 2000), rows(order, 2000, 4000)
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(first, np.arange(2000))[0, 1]) < 0.5  # groups of a sorted source are shuffled too


def test_a_stretch_of_the_order_reads_few_row_groups() -> None:
    order = make([1000] * 500)
    for start in (0, 7_500, 123_456, 10**9):
        groups = set((rows(order, start, start + 1000) // 1000).tolist())
        assert 2 <= len(groups) <= 2 * BUFFER_GROUPS


def test_a_pickled_order_is_the_same() -> None:
    order = make([10] * 30)
    rows(order, 0, 10)
    assert rows(pickle.loads(pickle.dumps(order)), 0, 900).tolist() == rows(order, 0, 900).tolist()


def test_several_orders_at_once_are_each_what_they_are_alone() -> None:
    orders = [make([50] * 20, 0.5, seed=1), make([7], seed=2), make([9] * 9, seed=3)]
    which = np.array([0, 1, 2, 2, 1, 0, 0, 1] * 50)
    counts = np.concatenate([np.cumsum(which == number)[:, None] for number in range(3)], axis=1)[np.arange(len(which)), which] - 1
    drawn, _ = draw_rows(orders, which, counts)
    for number, order in enumerate(orders):
        mine = which == number
        assert drawn[mine].tolist() == rows(order, 0, int(mine.sum())).tolist()
