"""The loop of Ray Data rests while rows are held back, and only then."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from apprentice.data import backpressure as pace
from apprentice.data.corpus import Corpus
from apprentice.data.stream import train_stream


@pytest.mark.parametrize(("held_back", "rests"), [([False, True], [pace.REST_S]), ([False, False], []), ([], [])])
def test_the_loop_rests_while_a_stage_holds_rows_back(monkeypatch, held_back, rests):
    slept: list[float] = []
    monkeypatch.setattr(pace.time, "sleep", slept.append)
    stages = [SimpleNamespace(_in_task_output_backpressure=held) for held in held_back]
    pace.Pace().on_execution_step(SimpleNamespace(_topology=stages))
    assert slept == rests


def test_the_stream_of_training_rows_is_paced(ray_cluster: None, corpus: Corpus, monkeypatch):
    turns: list[bool] = []
    monkeypatch.setattr(pace.Pace, "on_execution_step", lambda self, executor: turns.append(bool(executor._topology)))
    assert len(list(train_stream(corpus, windows=1).iter_rows())) > 3
    assert turns
    assert all(turns)
