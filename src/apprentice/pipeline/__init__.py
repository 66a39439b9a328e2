"""The pipeline: composes the stages of a run, which are prepare, train, evaluate, predict, serve and export.

Each stage checks what can be known before it writes or reserves anything, and resumes where an earlier attempt stopped.
"""

from __future__ import annotations

from apprentice.pipeline.chain import check_order
from apprentice.pipeline.evaluate import (
    Wanted,
    check_definitions,
    compare,
    evaluate,
    evaluate_model,
    evaluate_run,
    passed_gate,
    report,
)
from apprentice.pipeline.export import export
from apprentice.pipeline.init import Table, begin
from apprentice.pipeline.predict import predict
from apprentice.pipeline.prepare import Progress, check_recipe, prepare, preview, preview_page, trace
from apprentice.pipeline.serve import ask, endpoint, wait_for_stop
from apprentice.pipeline.train import number, runs, stopped_sentence, train, training_sentence

__all__ = [
    "Progress",
    "Table",
    "Wanted",
    "ask",
    "begin",
    "check_definitions",
    "check_order",
    "check_recipe",
    "compare",
    "endpoint",
    "evaluate",
    "evaluate_model",
    "evaluate_run",
    "export",
    "number",
    "passed_gate",
    "predict",
    "prepare",
    "preview",
    "preview_page",
    "report",
    "runs",
    "stopped_sentence",
    "trace",
    "train",
    "training_sentence",
    "wait_for_stop",
]
