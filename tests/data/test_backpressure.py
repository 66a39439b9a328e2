"""The loop of Ray Data pauses while rows are held back, and only then."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from apprentice.data import backpressure
from apprentice.data.corpus import Corpus
from apprentice.data.stream import train_stream


@pytest.mark.parametrize(("flags", "pauses"), [([False, True], [backpressure.PAUSE_S]), ([False, False], []), ([], [])])
def test_the_loop_pauses_while_an_operator_holds_rows_back(monkeypatch, flags, pauses):
    slept: list[float] = []
    monkeypatch.setattr(backpressure.time, "sleep", slept.append)
    operators = [SimpleNamespace(_in_task_output_backpressure=flag) for flag in flags]
    backpressure.BackpressurePause().on_execution_step(SimpleNamespace(_topology=operators))
    assert slept == pauses


def test_the_stream_of_training_rows_is_paced(ray_cluster: None, corpus: Corpus, monkeypatch):
    turns: list[bool] = []
    monkeypatch.setattr(
        backpressure.BackpressurePause, "on_execution_step", lambda self, executor: turns.append(bool(executor._topology))
    )
    assert len(list(train_stream(corpus, windows=1).iter_rows())) > 3
    assert turns
    assert all(turns)
