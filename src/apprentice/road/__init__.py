"""The road: prepare, train, evaluate and serve, one after the other. The only place that knows all the stages.

Each stage checks what can be known before it writes or reserves anything, and goes on where an earlier attempt stopped.
"""

from __future__ import annotations

from apprentice.road.data import Progress, check_recipe, prepare, preview, preview_page, trace
from apprentice.road.evaluation import evaluate, evaluate_model, evaluate_run
from apprentice.road.serving import ask, endpoint, wait_for_stop
from apprentice.road.training import number, runs, train, training_sentence

__all__ = [
    "Progress",
    "ask",
    "check_recipe",
    "endpoint",
    "evaluate",
    "evaluate_model",
    "evaluate_run",
    "number",
    "prepare",
    "preview",
    "preview_page",
    "runs",
    "trace",
    "train",
    "training_sentence",
    "wait_for_stop",
]
