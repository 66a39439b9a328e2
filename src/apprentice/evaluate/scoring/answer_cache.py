"""Answers that were given before, found again by what was asked of which model: what makes an evaluation resumable.

Every block of scored questions is written as it comes, a Parquet file of its own under `parts/`; the whole table of predictions
replaces them at the end. Either serves the next evaluation: an answer is taken where model, prompt, choices and limits are the
same, whatever else has changed. Knows nothing of models or of Ray.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from apprentice.evaluate.report import predictions
from apprentice.storage import Folder
from apprentice.tasks.schema import Task

PARTS = "parts"
ANSWER = ("prediction", "choice_logprobs", "choice_tokens", "choice_priors")


def key_of(model: str, question: Mapping[str, Any]) -> str:
    """The name of what is asked: `model` (a fingerprint of everything that shapes its answer) and the question's ids."""
    asked = [model, list(question["prompt_ids"]), [list(ids) for ids in question["choice_ids"] or []]]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


class Answers:
    """The answers in the folder `out`, and in the `others` (finished evaluations of the same models elsewhere)."""

    def __init__(self, out: Folder, tasks: Sequence[Task], others: Iterable[Folder] = ()) -> None:
        self._parts = out / PARTS
        self._tasks = tasks
        self._known: dict[str, dict[str, Any]] = {}
        files = [folder / predictions.FILE for folder in (out, *others)]
        parts = self._parts.children()
        for file in [*(file for file in files if file.exists()), *parts]:
            self._read(file)
        self._next = 1 + max((int(part.name.split(".")[0]) for part in parts if part.name.endswith(".parquet")), default=0)

    def __len__(self) -> int:
        return len(self._known)

    def find(self, key: str) -> dict[str, Any] | None:
        """What was answered to the question of this key, or None."""
        return self._known.get(key)

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes answered questions; they are found again from now on, in this process and the next."""
        buffer = io.BytesIO()
        pq.write_table(predictions.scored(records, self._tasks), buffer, compression="zstd")
        (self._parts / f"{self._next:06d}.parquet").write_bytes(buffer.getvalue())
        self._next += 1
        self._known |= {record["key"]: {name: record.get(name) for name in ANSWER} for record in records if _answered(record)}

    def close(self) -> None:
        """Removes the parts: the table of predictions holds them all."""
        self._parts.delete()

    def _read(self, file: Folder) -> None:
        if not file.name.endswith(".parquet"):
            return
        table = pq.read_table(io.BytesIO(file.read_bytes()))
        if {"key", *ANSWER} <= set(table.column_names):  # a table of an older version is simply not used
            for record in table.select(["key", *ANSWER]).to_pylist():
                if _answered(record):
                    self._known[record.pop("key")] = record


def _answered(record: Mapping[str, Any]) -> bool:
    """Whether there is an answer to be found again; what ranks by numbers that are not finite is none, and is asked again."""
    numbers = [*(record.get("choice_logprobs") or ()), *(record.get("choice_priors") or ())]
    return bool(record["key"]) and record["prediction"] is not None and all(map(math.isfinite, numbers))
