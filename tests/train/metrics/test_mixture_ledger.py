"""Counting what each task got."""

from __future__ import annotations

import pytest

from apprentice.train.batch import RowFacts
from apprentice.train.metrics.mixture_ledger import Ledger


def test_report() -> None:
    ledger = Ledger()
    ledger.add([RowFacts(0, 0, [1, 2, 3], [0, 2, 0], [4, 10, 6], {"a": {"too_long": 2}})])
    ledger.add([RowFacts(1, 0, [4], [2], [20], {"a": {"too_long": 1, "null": 1}})])
    report = ledger.report(
        ["a", "held_out", "b"], {"a": 0.75, "b": 0.25}, {"a": 8, "b": 4, "held_out": 9}, {"a": 5.0, "b": 15.0}, {"a": {"null": 2}}
    )
    assert (report["examples"], report["target_tokens"]) == (4, 40)
    assert report["tasks"] == {
        "a": {
            "requested_share": 0.75,
            "requested_share_of_target_tokens": 0.5,
            "share_of_examples": 0.5,
            "share_of_target_tokens": 0.25,
            "examples": 2,
            "target_tokens": 10,
            "passes_over_its_rows": 0.25,
            "dropped_or_truncated": {"too_long": 3, "null": 1},
            "left_out_of_the_index": {"null": 2},
        },
        "b": {
            "requested_share": 0.25,
            "requested_share_of_target_tokens": 0.5,
            "share_of_examples": 0.5,
            "share_of_target_tokens": 0.75,
            "examples": 2,
            "target_tokens": 30,
            "passes_over_its_rows": 0.5,
            "dropped_or_truncated": {},
            "left_out_of_the_index": {},
        },
    }
    assert report["warnings"] == []


def test_drift_and_rows_drawn_too_often() -> None:
    ledger = Ledger({0: 75, 1: 25}, {0: 75, 1: 25}, {})
    assert ledger.drift({0: 0.7, 1: 0.2, 2: 0.1}) == pytest.approx(0.1)
    assert (ledger.drift({}), Ledger().drift({0: 0.5})) == (0.0, 0.5)
    report = ledger.report(["a", "b"], {"a": 0.75, "b": 0.25}, {"a": 24, "b": 9}, {"a": 1.0, "b": 1.0}, {})
    assert [line.split(";")[0] for line in report["warnings"]] == ["a: every row was drawn 3.1 times"]
