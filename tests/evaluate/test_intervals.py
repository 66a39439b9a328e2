"""The bootstrap on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from apprentice.evaluate.intervals import RowSums, bootstrap, interval, p_value, swapped, verdict
from apprentice.evaluate.metrics import METRICS

ACCURACY = METRICS["accuracy"]


def sums(scores: np.ndarray) -> RowSums:
    """Rows (first axis) with their wordings (second)."""
    rows = np.repeat(np.arange(len(scores)), scores.shape[1])
    return RowSums.of(rows, scores.reshape(-1, 1))


def test_predictions_are_grouped_by_row() -> None:
    found = RowSums.of([7, 3, 7, 9], [(1.0, 2.0), (0.0, 1.0), (0.5, 4.0), (1.0, 1.0)])
    assert found.rows.tolist() == [3, 7, 9]
    assert found.sums.tolist() == [[0.0, 1.0], [1.5, 6.0], [1.0, 1.0]]
    assert found.counts.tolist() == [1.0, 2.0, 1.0]
    assert found.only(np.array([9, 7, 1])).rows.tolist() == [7, 9]
    assert found.score(ACCURACY) == pytest.approx(62.5)


def test_the_same_key_gives_the_same_draws_and_another_key_others() -> None:
    column = {"a": sums(np.random.default_rng(0).integers(0, 2, (50, 2)).astype(float))}
    first, again, other = (bootstrap(column, ACCURACY, key, 200)["a"] for key in ("x", "x", "y"))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_draws_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    column = {"a": sums(np.random.default_rng(0).random((40, 1)))}
    whole = bootstrap(column, ACCURACY, "x", 100)["a"]
    monkeypatch.setattr("apprentice.evaluate.intervals._CHUNK", 40 * 7)
    np.testing.assert_allclose(bootstrap(column, ACCURACY, "x", 100)["a"], whole)


def test_a_constant_difference_has_no_width() -> None:
    base = np.random.default_rng(1).random((30, 2)) / 2
    draws = bootstrap({"base": sums(base), "tuned": sums(base + 0.25)}, ACCURACY, "x", 300)
    low, high = interval(draws["tuned"] - draws["base"])
    assert (low, high) == pytest.approx((25.0, 25.0))
    assert np.ptp(draws["base"]) > 1  # though each score varies


def test_wordings_of_a_row_stay_together() -> None:
    """Eight wordings that always agree say no more than one: the interval is as wide as that of one wording."""
    one = np.random.default_rng(2).integers(0, 2, (60, 1)).astype(float)
    alone, eight = (bootstrap({"a": sums(scores)}, ACCURACY, "x", 500)["a"] for scores in (one, np.repeat(one, 8, axis=1)))
    np.testing.assert_allclose(alone, eight)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    covered = 0
    for trial in range(300):
        low, high = interval(bootstrap({"a": sums((random.random((80, 1)) < 0.6).astype(float))}, ACCURACY, f"{trial}", 400)["a"])
        covered += low <= 60.0 <= high
    assert 270 <= covered <= 297  # 95% of 300 is 285, with a standard deviation of 4


def test_the_width_is_that_of_the_normal_approximation() -> None:
    scores = (np.arange(400) % 2).astype(float)[:, None]
    low, high = interval(bootstrap({"a": sums(scores)}, ACCURACY, "x", 4000)["a"])
    assert low == pytest.approx(50 - 1.96 * 2.5, abs=0.4)
    assert high == pytest.approx(50 + 1.96 * 2.5, abs=0.4)


def test_columns_with_other_rows_are_no_pair() -> None:
    with pytest.raises(ValueError, match="different rows"):
        bootstrap({"a": sums(np.ones((3, 1))), "b": sums(np.ones((4, 1)))}, ACCURACY, "x", 10)


@pytest.mark.parametrize(("low", "high", "word"), [(0.1, 2, "better"), (-2, -0.1, "worse"), (-1, 1, "unclear"), (0, 1, "unclear")])
def test_verdict(low: float, high: float, word: str) -> None:
    assert verdict(low, high) == word


def test_the_paired_test_is_fair_and_sees_a_difference() -> None:
    random = np.random.default_rng(7)
    values = []
    for trial in range(200):  # no difference: small values are as rare as they say
        one, other = (sums((random.random((40, 1)) < 0.5).astype(float)) for _ in range(2))
        values.append(p_value(one.score(ACCURACY) - other.score(ACCURACY), swapped(one, other, ACCURACY, f"{trial}", 400)))
    assert sum(value <= 0.05 for value in values) <= 20
    assert max(values) > 0.5
    base = (np.arange(40) % 2).astype(float)[:, None]
    better = np.maximum(base, (np.arange(40) < 20).astype(float)[:, None])  # ten rows gained
    one, other = sums(better), sums(base)
    # All ten swaps the same way: 2 in 1024.
    assert p_value(25.0, swapped(one, other, ACCURACY, "x", 20_000)) == pytest.approx(2 / 1024, rel=0.5)
    assert p_value(0.0, swapped(one, one, ACCURACY, "x", 100)) == 1.0
