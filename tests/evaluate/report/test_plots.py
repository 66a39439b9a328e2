"""Plots of a report say what they show."""

from __future__ import annotations

from apprentice.evaluate.report.plots import shot_curves
from apprentice.evaluate.report.report_schema import Column, GroupEntry, GroupMean, Report
from apprentice.tasks.exposure import EXPOSURES


def test_each_panel_names_what_training_saw_of_its_tasks() -> None:
    columns = [Column(key=name, subject=name, shots=0, title=name, against=None) for name in ("majority", "tuned")]
    steadiness = dict.fromkeys(("worst", "spread", "changed", "consistency"))
    means = {"tuned": GroupMean(mean=50.0, interval=(40.0, 60.0), tasks=1, **steadiness)}
    pools = [
        GroupEntry(kind="ranked", exposure=exposure, held_out=exposure == "held_out", tasks=1, columns=means, differences={})
        for exposure in EXPOSURES
    ]
    report = Report.model_construct(columns=columns, pools=pools)
    drawn = shot_curves(report)
    assert [f"ranked, {words}" in drawn for words in ("held out", "scored only", "trained on")] == [True] * 3
