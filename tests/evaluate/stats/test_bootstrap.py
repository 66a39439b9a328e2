"""The bootstrap on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from apprentice.evaluate.stats.bootstrap import (
    RowSums,
    adjust_p_values,
    bootstrap,
    difference_interval,
    mean_interval,
    p_value,
    percentiles,
    permuted_differences,
    score_interval,
    verdict,
)
from apprentice.evaluate.stats.metrics import METRICS

ACCURACY = METRICS["accuracy"]


def sums(scores: np.ndarray) -> RowSums:
    """Rows (first axis) with their wordings (second)."""
    rows = np.repeat(np.arange(len(scores)), scores.shape[1])
    return RowSums.of(rows, scores.reshape(-1, 1))


def test_predictions_are_grouped_by_row() -> None:
    sums = RowSums.of([7, 3, 7, 9], [(1.0, 2.0), (0.0, 1.0), (0.5, 4.0), (1.0, 1.0)])
    assert sums.rows.tolist() == [3, 7, 9]
    assert sums.sums.tolist() == [[0.0, 1.0], [1.5, 6.0], [1.0, 1.0]]
    assert sums.counts.tolist() == [1.0, 2.0, 1.0]
    assert sums.only(np.array([9, 7, 1])).rows.tolist() == [7, 9]
    assert sums.score(ACCURACY) == pytest.approx(62.5)


def test_the_same_key_gives_the_same_draws_and_another_key_others() -> None:
    column = {"a": sums(np.random.default_rng(0).integers(0, 2, (50, 2)).astype(float))}
    first, again, other = (bootstrap(column, ACCURACY, key, 200)["a"] for key in ("x", "x", "y"))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_draws_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    column = {"a": sums(np.random.default_rng(0).random((40, 1)))}
    whole = bootstrap(column, ACCURACY, "x", 100)["a"]
    monkeypatch.setattr("apprentice.evaluate.stats.bootstrap._CHUNK", 40 * 7)
    np.testing.assert_allclose(bootstrap(column, ACCURACY, "x", 100)["a"], whole)


def test_a_constant_difference_has_no_width() -> None:
    base = np.random.default_rng(1).random((30, 2)) / 2
    draws = bootstrap({"base": sums(base), "tuned": sums(base + 0.25)}, ACCURACY, "x", 300)
    low, high = percentiles(draws["tuned"] - draws["base"])
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
        low, high = percentiles(
            bootstrap({"a": sums((random.random((80, 1)) < 0.6).astype(float))}, ACCURACY, f"{trial}", 400)["a"]
        )
        covered += low <= 60.0 <= high
    assert 270 <= covered <= 297  # 95% of 300 is 285, with a standard deviation of 4


def test_the_width_is_that_of_the_normal_approximation() -> None:
    scores = (np.arange(400) % 2).astype(float)[:, None]
    low, high = percentiles(bootstrap({"a": sums(scores)}, ACCURACY, "x", 4000)["a"])
    assert low == pytest.approx(50 - 1.96 * 2.5, abs=0.4)
    assert high == pytest.approx(50 + 1.96 * 2.5, abs=0.4)


def test_columns_with_other_rows_are_no_pair() -> None:
    with pytest.raises(ValueError, match="different rows"):
        bootstrap({"a": sums(np.ones((3, 1))), "b": sums(np.ones((4, 1)))}, ACCURACY, "x", 10)


@pytest.mark.parametrize(
    ("low", "high", "p", "word"),
    [
        (0.1, 2, 0.01, "better"),
        (-2, -0.1, 0.05, "worse"),
        (-1, 1, 0.01, "unclear"),
        (0, 1, 0.01, "unclear"),
        (0.1, 2, 0.06, "unclear"),
    ],
)
def test_verdict(low: float, high: float, p: float, word: str) -> None:
    assert verdict(low, high, p) == word


def binary(right: int, rows: int, wordings: int = 1) -> RowSums:
    return sums(np.repeat((np.arange(rows) < right).astype(float)[:, None], wordings, axis=1))


@pytest.mark.parametrize(("right", "rows"), [(20, 20), (0, 20), (19, 20), (7, 10), (1, 1), (150, 300)])
def test_a_share_has_wilsons_interval(right: int, rows: int) -> None:
    expected = binomtest(right, rows).proportion_ci(method="wilson")
    assert score_interval(binary(right, rows), ACCURACY, "x") == pytest.approx((100 * expected.low, 100 * expected.high))
    # Wordings that always agree say no more than one.
    assert score_interval(binary(right, rows, 6), ACCURACY, "x") == pytest.approx((100 * expected.low, 100 * expected.high))


def test_all_right_is_not_certain_to_be_right_always() -> None:
    assert score_interval(binary(20, 20), ACCURACY, "x") == pytest.approx((83.9, 100.0), abs=0.05)


def test_wordings_that_do_not_agree_count_as_answers_of_their_own() -> None:
    scores = np.random.default_rng(5).integers(0, 2, (200, 4)).astype(float)
    low, high = score_interval(sums(scores), ACCURACY, "x")
    drawn = percentiles(bootstrap({"a": sums(scores)}, ACCURACY, "x", 2000)["a"])
    assert high - low == pytest.approx(drawn[1] - drawn[0], rel=0.15)


@pytest.mark.parametrize("share", [0.6, 0.95])
def test_the_interval_of_a_share_covers_the_truth_near_the_edge_too(share: float) -> None:
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(1000):
        low, high = score_interval(sums((random.random((20, 1)) < share).astype(float)), ACCURACY, "x")
        covered += low <= 100 * share <= high
    assert 915 <= covered <= 985


@pytest.mark.parametrize(
    ("both", "first", "second", "neither", "low", "high"),
    [
        # Newcombe 1998 (Stat. Med. 17, 2635), table III, method 10: a, b, c, d and the limits.
        (36, 12, 2, 0, 0.0569, 0.3404),
        (36, 14, 0, 0, 0.1528, 0.4167),
        (54, 0, 0, 0, -0.0664, 0.0664),
    ],
)
def test_a_difference_of_shares_has_newcombes_interval(
    both: int, first: int, second: int, neither: int, low: float, high: float
) -> None:
    ours = sums(np.array([1.0] * (both + first) + [0.0] * (second + neither))[:, None])
    theirs = sums(np.array([1.0] * both + [0.0] * first + [1.0] * second + [0.0] * neither)[:, None])
    assert difference_interval(ours, theirs, ACCURACY, "x") == pytest.approx((100 * low, 100 * high), abs=0.01)


def test_pairs_are_narrower_than_two_samples() -> None:
    one = (np.random.default_rng(1).random((100, 1)) < 0.6).astype(float)
    paired = difference_interval(sums(np.maximum(one, np.eye(100)[:, :1])), sums(one), ACCURACY, "x")
    shuffled = difference_interval(sums(np.maximum(one, np.eye(100)[:, :1])), sums(one[::-1].copy()), ACCURACY, "x")
    assert np.ptp(paired) < np.ptp(shuffled) / 2


@pytest.mark.parametrize(("name", "least"), [("token_f1", 0.0), ("length_bias", -100.0)])
def test_where_all_resamples_agree_the_interval_keeps_its_width(name: str, least: float) -> None:
    metric, all_right = METRICS[name], sums(np.ones((20, 1)))
    low, high = score_interval(all_right, metric, "x", 100)
    assert (low, high) == pytest.approx((least + (100 - least) * 0.8389, 100.0), abs=0.1)
    below, above = difference_interval(all_right, all_right, metric, "x", 100)
    assert below == pytest.approx(-above)
    assert above > 10


def test_other_metrics_keep_the_bootstrap() -> None:
    column = sums(np.random.default_rng(4).random((50, 2)))
    assert score_interval(column, METRICS["token_f1"], "x", 300) == percentiles(
        bootstrap({"": column}, METRICS["token_f1"], "x", 300)[""]
    )


def test_the_limits_of_independent_tasks_add_up_as_squares() -> None:
    assert mean_interval([(50.0, 40.0, 60.0)]) == pytest.approx((40.0, 60.0))
    assert mean_interval([(100.0, 84.0, 100.0), (0.0, 0.0, 12.0)]) == pytest.approx((50.0 - 8.0, 50.0 + 6.0))
    assert mean_interval([(10.0, 7.0, 14.0), (30.0, 26.0, 33.0)]) == pytest.approx((20.0 - 2.5, 20.0 + 2.5))


def test_many_comparisons_are_corrected_for() -> None:
    assert adjust_p_values([]) == []
    assert adjust_p_values([0.04]) == [0.04]
    # Benjamini and Hochberg: p times their number over the rank, never more than the next larger one's.
    assert adjust_p_values([0.04, 0.001, 0.5, 0.03]) == pytest.approx([0.04 * 4 / 3, 0.004, 0.5, 0.04 * 4 / 3])


def test_the_paired_test_is_fair_and_sees_a_difference() -> None:
    random = np.random.default_rng(7)
    values = []
    for trial in range(200):  # no difference: small values are as rare as they say
        one, other = (sums((random.random((40, 1)) < 0.5).astype(float)) for _ in range(2))
        values.append(
            p_value(one.score(ACCURACY) - other.score(ACCURACY), permuted_differences(one, other, ACCURACY, f"{trial}", 400))
        )
    assert sum(value <= 0.05 for value in values) <= 20
    assert max(values) > 0.5
    base = (np.arange(40) % 2).astype(float)[:, None]
    better = np.maximum(base, (np.arange(40) < 20).astype(float)[:, None])  # ten rows gained
    one, other = sums(better), sums(base)
    # All ten swaps the same way: 2 in 1024.
    assert p_value(25.0, permuted_differences(one, other, ACCURACY, "x", 20_000)) == pytest.approx(2 / 1024, rel=0.5)
    assert p_value(0.0, permuted_differences(one, one, ACCURACY, "x", 100)) == 1.0
