"""History of a run for its report: training curve, mixture ledger, difference of the export, test rows found in training data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apprentice.run.folder import Run
from apprentice.run.json_lines import read_records
from apprentice.run.time_ledger import TimeLedger
from apprentice.storage import Folder

MOST_POINTS = 400  # of the curve: more are not seen in a picture


def read_history(run: Run | None) -> dict[str, Any]:
    """`history` (a record per step and per validation, thinned evenly), `ledger`, `export` and `time`; empty for a bare model."""
    if run is None:
        return {"history": [], "ledger": None, "export": None, "time": None}
    history = [_point(record) for record in read_records(run.folder / "steps.jsonl")]
    steps = [record for record in history if "loss" in record]
    kept = {id(record) for record in steps[:: max(1, len(steps) // MOST_POINTS)]}
    history = [record for record in history if "loss" not in record or id(record) in kept]
    return {
        "history": history,
        "ledger": _content(run.ledger_file),
        "export": _content(run.export_file),
        "time": run.status().get("time"),
    }


def _content(file: Folder) -> dict[str, Any] | None:
    return dict(file.read_json()) if file.exists() else None


def export_sentence(facts: Mapping[str, Any] | None) -> str | None:
    """Sentence on how far the exported model is from the trained one; None for runs that did not record it."""
    if facts is None:
        return None
    what = "answers" if facts["of"] == "rewards" else "tokens"
    unit = "" if facts["of"] == "rewards" else " nats"
    return (
        f"The exported model ({facts['dtype']}) was held against the trained weights in float32 on {facts['examples']}"
        f" {facts['rows']} rows: the {facts['of']} of {facts['count']} {what} differ by {facts['mean']:.1e}{unit} in the mean and"
        f" by {facts['largest']:.1e}{unit} at most."
    )


def time_sentence(time: Mapping[str, Any] | None) -> str | None:
    """Sentence on where a run's wall time went, from the `time` of its status.json; None for runs that did not record it."""
    ledger = TimeLedger.from_status({} if time is None else {"time": time})
    return None if ledger is None else f"Where the training's time went: {ledger.describe()}."


def _point(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("step", "loss", "validation_loss") if record.get(key) is not None}


def summarise_contamination(shared_passages: Mapping[str, Any]) -> dict[str, Any]:
    """Task → how many of its test rows share a passage with training data, from the index's report; empty where nobody looked.

    Training rows that were dropped say what the score would have been inflated by, and how alike the data are; those that were
    kept, because the run was made before it was known that the task would be scored, do inflate it.
    """
    return {
        task: {
            "rows": seen["shared"],
            "of": seen["test_rows"],
            "dropped": sum(seen.get("training_rows_dropped", {}).values()),
            "kept": sum(seen.get("training_rows_kept", {}).values()),
        }
        for task, seen in shared_passages.items()
    }
