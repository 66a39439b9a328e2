"""One scoring worker: a model in memory, blocks of questions in, predictions out. A plain class; what calls it may be Ray."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from apprentice.data.layout import Layout
from apprentice.errors import ApprenticeError
from apprentice.evaluate.generate import reply
from apprentice.evaluate.pool import Pool
from apprentice.evaluate.predictions import ENCODED
from apprentice.evaluate.prompts import Limits
from apprentice.evaluate.rank import rank
from apprentice.models.loading import count_parameters, load_model, resolve_dtype
from apprentice.recipe import Model

ASKED = pa.schema([("place", pa.int64()), *ENCODED])  # place: of the question among all of its subject
ANSWERED = pa.schema(
    [
        ("place", pa.int64()),
        ("prediction", pa.string()),
        ("choice_logprobs", pa.list_(pa.float64())),
        ("failure", pa.string()),  # why the whole block could not be answered; then it is the only line
    ]
)


class Scorer:
    """Answers blocks of questions with the model in `folder`, which it loads with the first of them.

    What the user can mend becomes a `failure` in the answer, not an exception: Ray would print that with all its stacks.
    """

    def __init__(self, folder: Path, model: Model, layout: Layout, limits: Limits, pool: Pool) -> None:
        torch.set_num_threads(pool.cpus)
        self._folder, self._settings = folder, model
        self._device = "cuda" if pool.gpus else "cpu"
        self._layout, self._limits = layout, limits

    def __call__(self, block: pa.Table) -> pa.Table:
        """A block of the schema `ASKED`, all of it ranked or all of it generated, becomes one of `ANSWERED`."""
        asked = block.to_pylist()
        try:
            answers = (
                rank(self._model, asked) if asked[0]["choices"] else reply(self._model, asked, self._layout, self._limits.reply)
            )
        except ApprenticeError as error:
            return pa.Table.from_pylist([{"failure": str(error)}], schema=ANSWERED)
        rows = [{"place": question["place"], **answer} for question, answer in zip(asked, answers, strict=True)]
        return pa.Table.from_pylist(rows, schema=ANSWERED)

    @cached_property
    def _model(self) -> Any:
        loaded: Any = load_model(self._folder, resolve_dtype(self._settings.dtype, self._device), self._settings.attention)
        return loaded.to(self._device)


def weight_bytes(folder: Path, model: Model, *, gpu: bool) -> int:
    """Bytes of one copy of the weights in the number format that scoring uses."""
    return count_parameters(folder) * resolve_dtype(model.dtype, "cuda" if gpu else "cpu").itemsize
