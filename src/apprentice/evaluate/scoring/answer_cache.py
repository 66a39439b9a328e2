"""Cache of answers, keyed by model and question; it makes an evaluation resumable.

Every block of scored questions is written as it arrives, to a Parquet file of its own under `parts/`. At the end the table of
predictions replaces these files. The next evaluation reads either: an answer is reused if model, prompt, choices and limits are the
same, whatever else has changed.
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

PARTS = "parts"
ANSWER = ("prediction", "choice_logprobs", "choice_tokens", "choice_priors")


def cache_key(model: str, question: Mapping[str, Any]) -> str:
    """Cache key of a question: a hash of the fingerprint `model` and of the token ids of prompt and choices."""
    parts = [model, list(question["prompt_ids"]), [list(ids) for ids in question["choice_ids"] or []]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class AnswerCache:
    """Cache of the answers in the folder `out` and in `others`, the folders of finished evaluations. New answers go to `out`."""

    def __init__(self, out: Folder, others: Iterable[Folder] = ()) -> None:
        self._parts = out / PARTS
        self._known: dict[str, dict[str, Any]] = {}
        files = [folder / predictions.FILE for folder in (out, *others)]
        parts = self._parts.children()
        for file in [*(file for file in files if file.exists()), *parts]:
            self._read(file)
        self._next = 1 + max((int(part.name.split(".")[0]) for part in parts if part.name.endswith(".parquet")), default=0)

    def __len__(self) -> int:
        return len(self._known)

    def find(self, key: str) -> dict[str, Any] | None:
        """Answer (`ANSWER` → value) to the question of this key, or None."""
        return self._known.get(key)

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes answered questions to a new part, without scores, and adds them to the cache."""
        buffer = io.BytesIO()
        pq.write_table(predictions.make_table(records, predictions.PREDICTION), buffer, compression="zstd")
        (self._parts / f"{self._next:06d}.parquet").write_bytes(buffer.getvalue())
        self._next += 1
        self._known |= {record["key"]: {name: record.get(name) for name in ANSWER} for record in records if _has_answer(record)}

    def close(self) -> None:
        """Deletes the parts; to be called once the table of predictions, which has all answers, is written."""
        self._parts.delete()

    def _read(self, file: Folder) -> None:
        if not file.name.endswith(".parquet"):
            return
        table = pq.read_table(io.BytesIO(file.read_bytes()))
        if {"key", *ANSWER} <= set(table.column_names):  # a table of an older version is simply not used
            for record in table.select(["key", *ANSWER]).to_pylist():
                if _has_answer(record):
                    self._known[record.pop("key")] = record


def _has_answer(record: Mapping[str, Any]) -> bool:
    """True if the record has a key and a usable answer; one with log-probabilities that are not finite is asked again."""
    numbers = [*(record.get("choice_logprobs") or ()), *(record.get("choice_priors") or ())]
    return bool(record["key"]) and record["prediction"] is not None and all(map(math.isfinite, numbers))
