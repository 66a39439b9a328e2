"""Rows of preference pairs made by hand: both answers to a prompt in turn, with reference log-probabilities that are drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from apprentice.train.batch import PackedRows
from tests.train.rows import packed_columns

ROWS = 3


def pair_rows(count: int = ROWS, seed: int = 0, *, labelled: bool = False, **changes: Any) -> PackedRows:
    """Packed rows of one or two pairs: both answers of a pair have the same prompt, as data/window.py makes them.

    With `labelled`, labelled answers with another row's beside each.
    """
    columns = packed_columns(2 * count, seed)
    names = ("input_ids", "positions", "segment_ids", "loss_mask")
    kept = []
    for place in range(2 * count):
        segments = columns["segment_ids"][place]
        even = int(segments.max()) // 2 * 2
        for name in names:
            columns[name][place] = np.where(segments <= even, columns[name][place], 0)
        columns["examples"][place] = columns["examples"][place][: even // 2]
        columns["example_tasks"][place] = columns["example_tasks"][place][: even // 2]
        columns["example_targets"][place] = [1] * (even // 2)
        kept.append(even)
    rng = np.random.default_rng(5)
    if labelled:
        columns["desirable"] = [(np.arange(even // 2) + place) % 2 for place, even in enumerate(kept)]
    columns["reference"] = [rng.normal(-20, 2, even).astype(np.float32) for even in kept]
    return replace(PackedRows.from_columns(columns), **changes).share(0, 2)
