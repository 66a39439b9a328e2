"""Targets of a run's rows, for tables of a teacher that tests make up."""

from __future__ import annotations

from typing import Any

import numpy as np


def count_targets(corpus: Any) -> tuple[Any, list[int]]:
    """Source rows of the only task of `corpus`, ascending, and how many target tokens each has."""
    from apprentice.data.window import WindowRenderer
    from apprentice.train.batch import PackedRows

    [index] = corpus.indices.values()
    rows = np.sort(np.concatenate([index.train, index.validation]))
    read = PackedRows.from_columns(WindowRenderer(corpus).zero_shot(corpus.tasks[0], rows.tolist()))
    counts = {row: count for fact in read.facts for row, count in zip(fact.examples, fact.targets, strict=True)}
    return rows, [counts[row] for row in rows.tolist()]
