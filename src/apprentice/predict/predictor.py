"""Prediction worker: reads chunks of rows, writes Parquet parts of replies. A plain class that Ray Data calls."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from apprentice.data.encoding.prompt_format import Layout
from apprentice.data.encoding.tokenize import drop_reason, fit_prompt
from apprentice.errors import ApprenticeError
from apprentice.model_pool.answer_settings import AnswerSettings, TokenLimits
from apprentice.model_pool.generate import generate_replies
from apprentice.model_pool.model import load_worker_model
from apprentice.model_pool.pool import WorkerPool
from apprentice.predict.rows import InputRow, RowChunk, read_chunk
from apprentice.recipe import Model
from apprentice.storage import Folder
from apprentice.tasks.schema import Example

PART_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # of the input, from 0
        ("instruction", pa.string()),
        ("input", pa.string()),
        ("prediction", pa.string()),  # null where there is a problem
        ("prompt_tokens", pa.int32()),
        ("truncated", pa.string()),  # which part of the prompt was cut to fit, or empty
        ("problem", pa.string()),  # why there is no prediction, or empty
    ]
)


def part_file(out: Folder, number: int) -> Folder:
    """The file for the replies to chunk `number`."""
    return out / f"part-{number:06d}.parquet"


class Predictor:
    """Answers chunks with the model in `folder`, loaded at the first chunk, and writes each as a part of its own."""

    def __init__(
        self, folder: Path, model: Model, layout: Layout, limits: TokenLimits, file: Folder, out: Folder, pool: WorkerPool
    ) -> None:
        self._folder, self._settings, self._pool = folder, model, pool
        self._answer_settings = AnswerSettings(layout, limits.reply)
        self._limits, self._file, self._out = limits, file, out

    def __call__(self, block: pa.Table) -> pa.Table:
        """Answers a table of chunks. Returns `number`, `rows`, `problems` and `failure` of each chunk.

        An `ApprenticeError` ends the block: it is returned as `failure`, in a table of one row, because a retry would not help.
        """
        done = []
        for fields in block.to_pylist():
            chunk = RowChunk(**fields)
            try:
                table = self.answer_rows(read_chunk(self._file, chunk))
            except ApprenticeError as error:
                return pa.table({"number": [chunk.number], "rows": [0], "problems": [0], "failure": [str(error)]})
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression="zstd")
            part_file(self._out, chunk.number).write_bytes(buffer.getvalue())
            problems = sum(problem != "" for problem in table["problem"].to_pylist())
            done.append({"number": chunk.number, "rows": chunk.rows, "problems": problems, "failure": ""})
        return pa.Table.from_pylist(done)

    def answer_rows(self, rows: Sequence[InputRow]) -> pa.Table:
        """Table of the rows with their replies, in order; its schema is `PART_SCHEMA`."""
        layout = self._answer_settings.layout
        records: list[dict[str, Any]] = []
        questions = []
        for row in rows:
            record = {
                "row": row.number,
                "instruction": row.instruction,
                "input": row.input,
                "truncated": "",
                "problem": row.problem,
            }
            records.append(record)
            if row.problem:
                continue
            example = Example("", "", row.instruction, row.input, "")
            fitted = fit_prompt(layout, example, (), self._limits.prompt_before(self._limits.reply))
            if fitted is None:
                record["problem"] = drop_reason(layout, example)
                continue
            record |= {"prompt_tokens": len(fitted.ids), "truncated": fitted.truncated or ""}
            questions.append((record, {"row": row.number, "prompt_ids": fitted.ids}))
        if questions:
            replies = generate_replies(self._model, [question for _, question in questions], self._answer_settings)
            for (record, _), answer in zip(questions, replies, strict=True):
                record |= answer
        return pa.Table.from_pylist(records, schema=PART_SCHEMA)

    @cached_property
    def _model(self) -> Any:
        return load_worker_model(self._folder, self._settings, self._pool, self._limits.prompt + self._limits.reply)
