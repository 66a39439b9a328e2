"""Table of predictions: one row per question and subject; the file `predictions.parquet` has everything that a report needs.

A report is a pure function of this table (`apprentice.evaluate.stats.summary`), so it can be remade without any model. Facts about
the evaluation (tasks, subjects, settings, versions) are JSON in the metadata of the schema.
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
from apprentice.storage import Folder, with_retries
from apprentice.tasks.schema import Task

FILE = "predictions.parquet"
_FACTS = b"apprentice"

QUESTION = pa.schema(
    [
        ("task", pa.string()),
        ("row", pa.int64()),  # of the test source
        ("template", pa.string()),
        ("shots", pa.int32()),
        ("perturbation", pa.string()),  # name of the perturbation, or empty
        ("prompt", pa.string()),  # text that the model saw, after truncation
        ("target", pa.string()),
        ("references", pa.list_(pa.string())),
        ("choices", pa.list_(pa.string())),  # empty: generated
        ("exemplars", pa.list_(pa.int64())),  # their rows in the training source
        ("prompt_tokens", pa.int32()),
        ("truncated", pa.string()),  # which part of the prompt was cut, or empty
        ("dropped", pa.string()),  # why the question was not asked, or empty
    ]
)
ENCODED_QUESTION = pa.schema(
    [
        *QUESTION,
        ("prompt_ids", pa.list_(pa.int32())),
        ("choice_ids", pa.list_(pa.list_(pa.int32()))),
        ("tools", pa.string()),  # functions that may be called, as a JSON list; null without
    ]
)
PREDICTION = pa.schema(
    [
        ("subject", pa.string()),
        *QUESTION,
        ("prediction", pa.string()),  # null where dropped or unscored
        ("choice_logprobs", pa.list_(pa.float64())),  # summed over the choice's tokens and the end of the answer
        ("choice_tokens", pa.list_(pa.int32())),  # number of those tokens
        ("choice_priors", pa.list_(pa.float64())),  # the same sums after an empty question, if computed
        ("key", pa.string()),  # cache key of model and question: equal keys have equal answers
        ("unscored", pa.string()),  # why there is no answer though the question was asked, or empty
        ("score", pa.float64()),  # of this one prediction, by the task's first metric
        ("reward", pa.float64()),  # of a generated reply, by the model `evaluation.judge`
        ("log_ratio", pa.float64()),  # summed log-probability of the reply, less that under the first subject
        ("reply_tokens", pa.int32()),  # number of those tokens
    ]
)
_LATER = ("reward", "log_ratio", "reply_tokens")  # columns that older tables lack; read as nulls


def with_metadata(table: pa.Table, facts: Mapping[str, Any]) -> pa.Table:
    """Table with `facts`, all that a report needs besides predictions, in the metadata of its schema. They must be JSON."""
    return table.replace_schema_metadata({_FACTS: json.dumps(dict(facts), ensure_ascii=False).encode()})


def metadata_of(table: pa.Table) -> dict[str, Any]:
    """Facts that `with_metadata` stored. Raises `EvaluationError` if the table has none."""
    try:
        return dict(json.loads(table.schema.metadata[_FACTS]))
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"this is no table of predictions of apprentice: its schema carries no facts; choose a {FILE}."
        ) from error


def save(table: pa.Table, out: Folder) -> None:
    """Writes the predictions of an evaluation into the folder `out`, as Parquet."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    (out / FILE).write_bytes(buffer.getvalue())


def read(out: Folder) -> pa.Table:
    """Reads the predictions of an evaluation from the folder `out`.

    Raises `StorageError` if there are none in `out` or the store does not answer, `EvaluationError` if they are broken or lack
    what a report needs.
    """
    content = with_retries(out / FILE, (out / FILE).read_bytes)
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


def make_table(records: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Table of the records, of exactly this schema."""
    return pa.Table.from_pylist([dict(record) for record in records], schema=schema)


def score_predictions(records: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> pa.Table:
    """Table of predictions (`PREDICTION`) from answered questions, with a score for each prediction by its task's first metric."""
    metrics = {task.name: METRICS[task.metrics[0]] for task in tasks}
    rows = []
    for record in records:
        score = None
        if record["prediction"] is not None:
            score = metrics[record["task"]].score_one(record["prediction"], record["references"], record["choices"])
        blank = {name: record.get(name) for name in PREDICTION.names}
        texts = {"perturbation": record.get("perturbation") or "", "unscored": record.get("unscored") or ""}
        rows.append(blank | texts | {"score": score})
    return make_table(rows, PREDICTION)
