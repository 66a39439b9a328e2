"""A table of predictions made by hand, whose report can be worked out on paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from apprentice.evaluate.report.predictions import score_predictions, with_metadata
from apprentice.evaluate.stats.summary import summarise
from apprentice.recipe import Recipe
from apprentice.tasks.schema import Task

ROWS, WORDINGS = 8, ("w0", "w1")


def task(name: str, *, ranked: bool) -> Task:
    about: dict[str, Any] = {
        "name": name,
        "cluster": name.split("_")[0],
        "summary": f"About {name}.",
        "sources": [{"dataset": name}],
        "metrics": ["accuracy"] if ranked else ["token_f1", "exact_match"],
        "templates": [{"name": wording, "instruction": f"Answer | {wording}."} for wording in WORDINGS],
    }
    about |= {"choices": ["no", "yes"], "label": "label"} if ranked else {"answer": "{{ text }}"}
    return Task.model_validate(about)


TASKS = (task("alpha_rank", ranked=True), task("beta_rank", ranked=True), task("gamma_text", ranked=False))
HELD_OUT = frozenset(["beta_rank"])


def record(subject: str, of: Task, row: int, wording: str, prediction: str | None, shots: int = 0, **more: Any) -> dict[str, Any]:
    right = "yes" if of.is_ranked else "red house"
    return {
        "subject": subject,
        "task": of.name,
        "row": row,
        "template": wording,
        "shots": shots,
        "perturbation": "",
        "unscored": "",
        "prompt": f"<prompt> {of.name} {row} {wording}",
        "target": right,
        "references": [right],
        "choices": ["no", "yes"] if of.is_ranked else [],
        "exemplars": [],
        "prompt_tokens": 10,
        "truncated": "",
        "dropped": "",
        "prediction": prediction,
        "choice_logprobs": [-1.0, -2.0] if of.is_ranked else None,
    } | more


def predictions(base: Sequence[int] = (2, 4, 4), tuned: Sequence[int] = (6, 4, 8)) -> list[dict[str, Any]]:
    """Of the 8 rows of each task the first so many are right in both wordings; 5-shot base is as base, but only for alpha."""
    records = []
    for of, few, many in zip(TASKS, base, tuned, strict=True):
        for row in range(ROWS):
            for wording in WORDINGS:
                wrong, right = ("no", "yes") if of.is_ranked else ("blue house", "red house")
                records.append(record("base", of, row, wording, right if row < few else wrong))
                records.append(record("tuned", of, row, wording, right if row < many else wrong))
                if of.name == "alpha_rank":
                    records.append(record("base", of, row, wording, right if row < few else wrong, 5, exemplars=[1, 2, 3]))
                if of.is_ranked:
                    records.append(record("majority", of, row, wording, "no"))
    return records


def facts(recipe: Recipe) -> dict[str, Any]:
    from apprentice.evaluate.report.metadata import make_metadata

    majorities: dict[str, Any] = {"alpha_rank": {"label": 0}, "beta_rank": {"label": 0}, "gamma_text": None}
    return make_metadata(recipe, TASKS, HELD_OUT, majorities, 0.0) | {
        "seconds": 12.3,
        "subjects": [
            {"name": "base", "shots": [0, 5], "folder": "models/base", "layout": "chat", "contract": "the recipe's"},
            {"name": "tuned", "shots": [0], "folder": "models/tuned", "layout": "chat", "contract": "its own"},
        ],
        "story": {"history": [], "ledger": None},
        "not_scored": [{"task": "delta", "reason": "no test split"}],
    }


def report_of(table: pa.Table, resamples: int = 200) -> dict[str, Any]:
    """The contents of report.json."""
    return summarise(table, resamples=resamples).as_json()


def table(recipe: Recipe, records: Sequence[dict[str, Any]] | None = None) -> pa.Table:
    return with_metadata(score_predictions(predictions() if records is None else records, TASKS), facts(recipe))
