"""Series of steps.jsonl: reading on, going back after a fault, smoothing, downsampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.board.metric_series import MetricSeries, thin
from apprentice.run.folder import Run
from apprentice.storage import Folder


def add(folder: Path, *records: dict[str, Any]) -> None:
    with (folder / "steps.jsonl").open("a") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)


def test_it_reads_on_and_goes_back_with_the_training(tmp_path: Path) -> None:
    series = MetricSeries(Run(Folder.at(tmp_path)))
    assert series.read() == []
    add(tmp_path, *({"attempt": 1, "step": step, "loss": float(step)} for step in range(1, 6)))
    assert len(series.read()) == 5
    assert series.read() == []
    add(tmp_path, {"attempt": 2, "step": 3, "loss": 30.0}, {"attempt": 2, "step": 4, "validation_loss": 0.5})
    series.read()
    assert series.sampled("loss", points=100) == {"steps": [1, 2, 3], "values": [1.0, 2.0, 30.0]}
    assert series.sampled("validation_loss", points=100)["values"] == [0.5]
    assert [event["kind"] for event in series.events] == ["restart"]
    assert series.sampled("unknown", points=100) == {"steps": [], "values": []}


def test_a_run_that_starts_over_is_read_anew(tmp_path: Path) -> None:
    series = MetricSeries(Run(Folder.at(tmp_path)))
    add(tmp_path, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0})
    series.read()
    (tmp_path / "steps.jsonl").write_text('{"step": 1, "loss": 7.0}\n')
    series.read()
    assert series.sampled("loss", points=100) == {"steps": [1], "values": [7.0]}


def test_smoothing_is_an_average_with_bias_correction(tmp_path: Path) -> None:
    series = MetricSeries(Run(Folder.at(tmp_path)))
    values = [4.0, 2.0, 6.0]
    add(tmp_path, *({"step": step, "loss": value} for step, value in enumerate(values)), {"step": 3, "loss": float("nan")})
    series.read()
    weighted = [(values[2] + 0.5 * values[1] + 0.25 * values[0]) / 1.75]
    assert series.sampled("loss", points=100, smoothing=0.5)["values"][-1:] == pytest.approx(weighted)
    assert series.sampled("loss", points=100)["steps"] == [0, 1, 2]  # JSON has no NaN


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000), st.integers(10, 200))
def test_no_peak_is_lost(values: list[float], points: int) -> None:
    kept = thin(np.array(values), points)
    assert len(kept) <= points + 2
    assert sorted(set(kept)) == list(kept)
    assert (kept[0], kept[-1]) == (0, len(values) - 1)
    assert {min(values), max(values)} <= {values[at] for at in kept}
