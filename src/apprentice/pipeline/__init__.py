"""The pipeline: composes the stages of a run, which are prepare, train, evaluate, predict, serve and export.

Each stage checks what can be known before it writes or reserves anything, and resumes where an earlier attempt stopped.
"""

from __future__ import annotations

from apprentice.pipeline.chain import check_order
from apprentice.pipeline.evaluate import (
    EvaluationOptions,
    check_definitions,
    check_gate,
    compare_runs,
    evaluate_model,
    evaluate_run,
    evaluate_target,
    rebuild_report,
)
from apprentice.pipeline.export.run_export import ExportOptions, export_run
from apprentice.pipeline.predict import predict_file
from apprentice.pipeline.prepare import (
    Progress,
    check_recipe,
    estimate_on_hardware,
    examine_machine,
    packed_window,
    prepare_run,
    preview_examples,
    preview_html,
    trace_examples,
)
from apprentice.pipeline.project.init import TableDescription, create_project
from apprentice.pipeline.serve import ask_endpoint, run_endpoint, wait_for_stop
from apprentice.pipeline.train import describe_run, format_loss, list_runs, stopped_sentence, train_run, training_sentence
from apprentice.pipeline.verify import verify_contract

__all__ = [
    "EvaluationOptions",
    "ExportOptions",
    "Progress",
    "TableDescription",
    "ask_endpoint",
    "check_definitions",
    "check_gate",
    "check_order",
    "check_recipe",
    "compare_runs",
    "create_project",
    "describe_run",
    "estimate_on_hardware",
    "evaluate_model",
    "evaluate_run",
    "evaluate_target",
    "examine_machine",
    "export_run",
    "format_loss",
    "list_runs",
    "packed_window",
    "predict_file",
    "prepare_run",
    "preview_examples",
    "preview_html",
    "rebuild_report",
    "run_endpoint",
    "stopped_sentence",
    "trace_examples",
    "train_run",
    "training_sentence",
    "verify_contract",
    "wait_for_stop",
]
