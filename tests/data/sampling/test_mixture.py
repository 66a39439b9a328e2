"""Shares of the four strategies, as integers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from apprentice.data.sampling.interleave import MAX_TOTAL
from apprentice.data.sampling.mixture import Size, epoch_rows, shares
from apprentice.errors import RecipeError
from apprentice.recipe import Mixture

SIZES = {"small": 100, "middle": 400, "large": 10_000, "empty": 0}
FLAN_2022 = {"flan": 40, "t0": 32, "natural_instructions": 20, "cot": 5, "dialog": 3}


def sized(sizes: dict[str, int]) -> dict[str, Size]:
    return {task: Size(rows) for task, rows in sizes.items()}


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
    assert list(shares(Mixture.model_validate(mixture), sized(SIZES)).values()) == expected
    assert list(shares(Mixture.model_validate(mixture), sized(SIZES))) == ["small", "middle", "large"]


def test_an_irrational_temperature_is_the_same_everywhere() -> None:
    weights = shares(Mixture(strategy="temperature", temperature=3.0), sized({"a": 1000, "b": 2000}))
    assert weights["b"] / weights["a"] == pytest.approx(2 ** (1 / 3), rel=1e-8)
    assert weights == {"a": 475123599, "b": 598618224}


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 10**15), min_size=1, max_size=200))
def test_weights_always_fit_the_rotation(sizes: list[int]) -> None:
    weights = shares(Mixture(), sized({str(number): size for number, size in enumerate(sizes)}))
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
        shares(Mixture(strategy="weights", weights=weights), sized(sizes))


def grouped(groups: dict[str, Any], sizes: dict[str, Size], **rest: Any) -> dict[str, Fraction]:
    weights = shares(Mixture.model_validate({"groups": groups} | rest), sizes)
    return {task: Fraction(weight, sum(weights.values())) for task, weight in weights.items()}


def test_flan_2022() -> None:
    """The five sub-mixtures in the published proportion, each dealing its share to its own tasks in its own way."""
    sizes = {f"{name}_{number}": Size(1000 * (number + 1), name) for name in FLAN_2022 for number in range(3)}
    groups = {name: {"share": share, "tasks": [name], "cap": 2000} for name, share in FLAN_2022.items()}
    shares_of_tasks = grouped(groups, sizes)
    assert {name: sum(shares_of_tasks[f"{name}_{number}"] for number in range(3)) for name in FLAN_2022} == {
        name: Fraction(share, 100) for name, share in FLAN_2022.items()
    }
    assert [shares_of_tasks[f"cot_{number}"] for number in range(3)] == [Fraction(5, 100) * Fraction(part, 5) for part in (1, 2, 2)]


def test_groups_in_groups() -> None:
    inner = {"a": {"share": 1, "tasks": ["x"]}, "b": {"share": 3, "tasks": ["y", "z"], "strategy": "equal"}}
    sizes = {"x": Size(5), "y": Size(10), "z": Size(1000), "w": Size(7)}
    shares_of_tasks = grouped({"outer": {"share": 0.6, "groups": inner}, "other": {"share": 0.4, "tasks": ["w"]}}, sizes)
    assert shares_of_tasks == {"x": Fraction(3, 20), "y": Fraction(9, 40), "z": Fraction(9, 40), "w": Fraction(2, 5)}


def test_a_group_without_rows_leaves_its_share_to_the_others() -> None:
    groups = {"a": {"share": 1, "tasks": ["x"]}, "b": {"share": 1, "tasks": ["y"]}, "c": {"share": 2, "tasks": ["z"]}}
    assert grouped(groups, {"x": Size(5), "y": Size(0), "z": Size(3)}) == {"x": Fraction(1, 3), "z": Fraction(2, 3)}


def test_shares_of_target_tokens() -> None:
    """Equal shares of the tokens that are learnt: the task with answers a quarter as long is drawn four times as often."""
    sizes = {"long": Size(10, "", 80.0), "short": Size(10, "", 20.0)}
    assert shares(Mixture(strategy="equal", by="target_tokens"), sizes) == {"long": 1, "short": 4}
    many = {str(number): Size(number + 1, "", 3.1 + number / 7) for number in range(3000)}
    weights = shares(Mixture(by="target_tokens"), many)
    tokens = {task: weight * many[task].target_tokens for task, weight in weights.items()}
    assert all(abs(tokens[task] / sum(tokens.values()) - size.rows / 4_501_500) < 1e-6 for task, size in many.items())


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": {"share": 1, "tasks": ["x", "y"]}, "b": {"share": 1, "tasks": ["y", "z"]}}, "'y' is in both 'a' and 'b'"),
        ({"a": {"share": 1, "tasks": ["x", "y"]}}, "'z' is in no group"),
        ({"a": {"share": 1, "tasks": ["x", "y", "nil"]}}, r"groups.a.tasks: 'nil' is neither .* Did you mean 'nli'\?"),
    ],
)
def test_wrong_groups_are_refused(groups: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        grouped(groups, {"x": Size(1, "nli"), "y": Size(1, "qa"), "z": Size(1, "qa")})


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"strategy": "equal", "groups": {"a": {"share": 1, "tasks": ["x"]}}}, "each group has its own"),
        ({"groups": {}}, "names no group"),
        ({"groups": {"a": {"share": 1}}}, "either `tasks` or `groups`"),
    ],
)
def test_groups_that_contradict_themselves(mixture: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Mixture.model_validate(mixture)


def test_an_epoch_keeps_to_the_caps_of_the_groups() -> None:
    sizes = {"a": Size(100, "nli"), "b": Size(7, "nli"), "c": Size(100), "d": Size(100), "e": Size(0)}
    assert epoch_rows(Mixture(cap=50), sizes) == {"a": 50, "b": 7, "c": 50, "d": 50, "e": 0}
    inner = {"small": {"share": 1, "cap": 5, "tasks": ["c"]}, "large": {"share": 1, "tasks": ["d", "e"]}}
    groups = {"first": {"share": 1, "cap": 20, "tasks": ["nli"]}, "second": {"share": 3, "groups": inner}}
    assert epoch_rows(Mixture.model_validate({"groups": groups}), sizes) == {"a": 20, "b": 7, "c": 5, "d": 100, "e": 0}
