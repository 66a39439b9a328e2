"""Mean, worst wording and spread."""

from __future__ import annotations

import pytest

from apprentice.evaluate.stats.robustness import Agreement, agreement, robustness


def test_spread_is_between_the_quartiles() -> None:
    spread = robustness({"a": 50.0, "b": 60.0, "c": 70.0, "d": 40.0, "e": 80.0})
    assert (spread.worst, spread.spread) == ("d", 20.0)


def test_one_wording_has_no_spread() -> None:
    spread = robustness({"only": 12.5})
    assert (spread.worst, spread.spread, dict(spread.wordings)) == ("only", 0.0, {"only": 12.5})


def test_of_equals_the_first_is_worst() -> None:
    assert robustness({"a": 1.0, "b": 1.0}).worst == "a"


def said(row: int, prediction: str, choices: tuple[str, ...] = ()) -> dict:
    return {"row": row, "prediction": prediction, "choices": list(choices)}


def test_agreement_over_the_askings_of_a_row() -> None:
    agreed = agreement([said(1, "a"), said(1, "a"), said(1, "b"), said(2, "c"), said(2, "The c!"), said(3, "alone")])
    assert agreed.changed == 50.0  # row 1 of rows 1 and 2
    assert agreed.consistency == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert agreement([said(3, "alone")]) == Agreement(None, None)


def test_ranked_answers_are_places_not_words() -> None:
    agreed = agreement([said(1, "yes", ("no", "yes")), said(1, "same", ("different", "same"))])
    assert agreed == Agreement(0.0, 100.0)
