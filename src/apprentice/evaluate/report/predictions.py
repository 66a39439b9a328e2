"""The table of predictions: one row per question and subject, with all that a report needs in the file itself.

A report is a pure function of this table (`apprentice.evaluate.stats.summary`), so it can be made again without any model.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from apprentice.errors import EvaluationError
from apprentice.evaluate.stats.metrics import METRICS
from apprentice.storage import Folder, answer_of
from apprentice.tasks.schema import Task

FILE = "predictions.parquet"
_FACTS = b"apprentice"

QUESTION = pa.schema(
    [
        ("task", pa.string()),
        ("row", pa.int64()),  # of the test source
        ("template", pa.string()),
        ("shots", pa.int32()),
        ("perturbation", pa.string()),  # what was changed on purpose, or empty
        ("prompt", pa.string()),  # what the model saw, after truncation
        ("target", pa.string()),
        ("references", pa.list_(pa.string())),
        ("choices", pa.list_(pa.string())),  # empty: generated
        ("exemplars", pa.list_(pa.int64())),  # rows of the training source that were shown
        ("prompt_tokens", pa.int32()),
        ("truncated", pa.string()),  # what was cut, or empty
        ("dropped", pa.string()),  # why the question was not asked, or empty
    ]
)
ENCODED = pa.schema([*QUESTION, ("prompt_ids", pa.list_(pa.int32())), ("choice_ids", pa.list_(pa.list_(pa.int32())))])
PREDICTION = pa.schema(
    [
        ("subject", pa.string()),
        *QUESTION,
        ("prediction", pa.string()),  # null where dropped or unscored
        ("choice_logprobs", pa.list_(pa.float64())),  # summed over the choice's tokens and the end of the answer
        ("choice_tokens", pa.list_(pa.int32())),  # how many those are
        ("choice_priors", pa.list_(pa.float64())),  # the same sums after an empty question, where they were asked for
        ("key", pa.string()),  # of what was asked of which model: equal keys have equal answers
        ("unscored", pa.string()),  # why there is no answer though the question was asked, or empty
        ("score", pa.float64()),  # by the task's first metric, 0 to 100; of this one prediction
        ("reward", pa.float64()),  # what `evaluation.judge` gives to a written reply
        ("log_ratio", pa.float64()),  # summed log-probability of the reply's tokens, less what the first subject gives to them
        ("reply_tokens", pa.int32()),  # how many those are
    ]
)
_LATER = ("reward", "log_ratio", "reply_tokens")  # columns that older tables lack and that may be empty


def with_facts(table: pa.Table, facts: Mapping[str, Any]) -> pa.Table:
    """The table with everything besides the predictions that the report says: tasks, subjects, settings, versions."""
    return table.replace_schema_metadata({_FACTS: json.dumps(dict(facts), ensure_ascii=False).encode()})


def facts_of(table: pa.Table) -> dict[str, Any]:
    """What `with_facts` put in. Raises `EvaluationError` if the table is not one of ours."""
    try:
        return dict(json.loads(table.schema.metadata[_FACTS]))
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"this is no table of predictions of apprentice: its schema carries no facts; choose a {FILE}."
        ) from error


def save(table: pa.Table, out: Folder) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    (out / FILE).write_bytes(buffer.getvalue())


def read(out: Folder) -> pa.Table:
    """The predictions of an evaluation.

    Raises `StorageError` if there are none in `out` or the store does not answer, `EvaluationError` if they are broken or lack
    what a report needs.
    """
    content = answer_of(out / FILE, (out / FILE).read_bytes)
    try:
        table = pq.read_table(io.BytesIO(content))
    except (pa.ArrowException, OSError) as error:
        raise EvaluationError(f"{out / FILE} is not a readable Parquet file; score again with --restart.") from error
    for name in _LATER:
        if name not in table.column_names:
            table = table.append_column(PREDICTION.field(name), pa.nulls(len(table), PREDICTION.field(name).type))
    if missing := [name for name in PREDICTION.names if name not in table.column_names]:
        raise EvaluationError(
            f"{out / FILE} is of an older version: it has no column {missing[0]!r}; score again with `apprentice evaluate`."
        )
    return table


def table_of(records: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Records as a table of exactly this schema."""
    return pa.Table.from_pylist([dict(record) for record in records], schema=schema)


def scored(records: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> pa.Table:
    """Questions with `subject` and `prediction` as the table of predictions, each with its own score."""
    metrics = {task.name: METRICS[task.metrics[0]] for task in tasks}
    rows = []
    for record in records:
        score = None
        if record["prediction"] is not None:
            score = metrics[record["task"]].of_one(record["prediction"], record["references"], record["choices"])
        blank = {name: record.get(name) for name in PREDICTION.names}
        texts = {"perturbation": record.get("perturbation") or "", "unscored": record.get("unscored") or ""}
        rows.append(blank | texts | {"score": score})
    return table_of(rows, PREDICTION)
