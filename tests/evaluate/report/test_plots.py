"""Plots of a report say what they show."""

from __future__ import annotations

from apprentice.evaluate.report.plots import shot_curves


def test_each_panel_names_what_training_saw_of_its_tasks() -> None:
    column = {"subject": "tuned", "shots": 0, "key": "tuned"}
    cell = {"mean": 50.0, "interval": [40.0, 60.0]}
    exposures = ("held_out", "scored_only", "trained_on")
    pools = [
        {"kind": "ranked", "exposure": exposure, "held_out": exposure == "held_out", "columns": {"tuned": cell}}
        for exposure in exposures
    ]
    drawn = shot_curves({"columns": [{"subject": "majority", "shots": 0, "key": "majority"}, column], "pools": pools})
    assert [f"ranked, {words}" in drawn for words in ("held out", "scored only", "trained on")] == [True] * 3
