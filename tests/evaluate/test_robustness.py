"""Mean, worst wording and spread."""

from __future__ import annotations

from apprentice.evaluate.robustness import robustness


def test_spread_is_between_the_quartiles() -> None:
    found = robustness({"a": 50.0, "b": 60.0, "c": 70.0, "d": 40.0, "e": 80.0})
    assert (found.worst, found.spread) == ("d", 20.0)


def test_one_wording_has_no_spread() -> None:
    found = robustness({"only": 12.5})
    assert (found.worst, found.spread, dict(found.wordings)) == ("only", 0.0, {"only": 12.5})


def test_of_equals_the_first_is_worst() -> None:
    assert robustness({"a": 1.0, "b": 1.0}).worst == "a"
