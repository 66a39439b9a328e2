"""Exemplars: nested, different, never the row itself, and out of few row groups."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.data.sampling.exemplars import POOL_RUNS, RUN_ROWS, ExemplarPool, exemplar_rows


@settings(deadline=None)
@given(
    kept=st.sets(st.integers(0, 5000), min_size=1, max_size=60).map(sorted),
    seed=st.integers(0, 1000),
    k=st.integers(0, 8),
    data=st.data(),
)
def test_exemplars_are_nested_different_and_never_the_row(kept: list[int], seed: int, k: int, data: st.DataObject) -> None:
    row = data.draw(st.one_of(st.sampled_from(kept), st.integers(0, 5000)))
    shots = exemplar_rows(seed, "sst2", row, k, np.array(kept))
    assert len(shots) == len(set(shots)) == min(k, len(kept) - (row in kept))
    assert row not in shots
    assert set(shots) <= set(kept)
    assert all(exemplar_rows(seed, "sst2", row, fewer, np.array(kept)) == shots[:fewer] for fewer in range(k))


def test_exemplars_depend_on_seed_task_and_row_alone() -> None:
    kept = np.arange(1000)
    assert exemplar_rows(17, "sst2", 5, 3, kept) == exemplar_rows(17, "sst2", 5, 3, kept)
    others = [exemplar_rows(18, "sst2", 5, 3, kept), exemplar_rows(17, "imdb", 5, 3, kept), exemplar_rows(17, "sst2", 6, 3, kept)]
    assert exemplar_rows(17, "sst2", 5, 3, kept) not in others
    assert exemplar_rows(17, "sst2", 5, 3, np.array([], dtype=np.int64)) == ()


def test_all_rows_of_a_small_task_are_used_about_equally() -> None:
    kept = np.arange(10)
    used = np.bincount([exemplar_rows(1, "t", row, 1, kept)[0] for row in range(1000, 1600)], minlength=10)
    assert used.sum() == 600
    assert (abs(used - 60) < 6 * 60**0.5).all(), used


def test_a_large_task_has_a_small_pool() -> None:
    pool = ExemplarPool(3, "c4", np.arange(0, 2_000_000, 2))
    assert len(pool) == len(set(pool.rows.tolist())) == POOL_RUNS * RUN_ROWS
    assert len(set((pool.rows // 10_000).tolist())) <= 2 * POOL_RUNS
    assert np.ptp(pool.rows) > 200_000  # not one stretch
