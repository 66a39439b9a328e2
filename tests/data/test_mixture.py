"""Shares of the four strategies, as integers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.data.mixture import shares
from apprentice.data.rotation import MAX_TOTAL
from apprentice.errors import RecipeError
from apprentice.recipe import Mixture

SIZES = {"small": 100, "middle": 400, "large": 10_000, "empty": 0}


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        ({"strategy": "equal"}, [1, 1, 1]),
        ({"strategy": "proportional"}, [1, 4, 100]),
        ({"strategy": "proportional", "cap": 300}, [1, 3, 3]),
        ({"strategy": "temperature", "temperature": 2.0}, [1, 2, 10]),
        ({"strategy": "temperature", "temperature": 1.0, "cap": 300}, [1, 3, 3]),
        ({"strategy": "weights", "weights": {"small": 0.1, "middle": 0.2, "large": 1}}, [1, 2, 10]),
    ],
)
def test_strategies(mixture: dict[str, Any], expected: list[int]) -> None:
    assert list(shares(Mixture.model_validate(mixture), SIZES).values()) == expected
    assert list(shares(Mixture.model_validate(mixture), SIZES)) == ["small", "middle", "large"]


def test_an_irrational_temperature_is_the_same_everywhere() -> None:
    weights = shares(Mixture(strategy="temperature", temperature=3.0), {"a": 1000, "b": 2000})
    assert weights["b"] / weights["a"] == pytest.approx(2 ** (1 / 3), rel=1e-8)
    assert weights == {"a": 475123599, "b": 598618224}


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 10**15), min_size=1, max_size=200))
def test_weights_always_fit_the_rotation(sizes: list[int]) -> None:
    weights = shares(Mixture(), {str(number): size for number, size in enumerate(sizes)})
    assert len(weights) == len(sizes)
    assert min(weights.values()) >= 1
    assert sum(weights.values()) <= MAX_TOTAL
    for number, size in enumerate(sizes):
        assert abs(weights[str(number)] / sum(weights.values()) - size / sum(sizes)) < 1e-6


@pytest.mark.parametrize(
    ("weights", "sizes", "message"),
    [
        ({"smal": 1.0}, SIZES, r"'smal' is not a task that is trained on. Did you mean 'small'\?"),
        ({"small": 1.0}, SIZES, "'middle' has no weight"),
        ({"small": 1.0, "middle": 1.0, "large": 1.0, "empty": 1.0}, SIZES, "'empty' has no rows"),
        ({"empty": 1.0}, {"empty": 0}, "no task has rows to train on"),
    ],
)
def test_wrong_weights_are_refused(weights: dict[str, float], sizes: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        shares(Mixture(strategy="weights", weights=weights), sizes)
