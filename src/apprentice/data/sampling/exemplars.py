"""Few-shot exemplars: the solved rows shown before a row, drawn by key (seed, task, row), nested, never the row itself.

Nested means that one exemplar is the first of two, and so on. Exemplars come from a pool of at most 4,096 training rows of the
task, in 8 contiguous runs of 512, so that few row groups of a large dataset have to be read. All exemplars of an example
are rendered with its own template.
"""

from __future__ import annotations

import numpy as np

from apprentice.data.index.row_ranges import RowRanges
from apprentice.data.sampling.permutation import Keys, Numbers, draw, key_of, permute

POOL_RUNS = 8
RUN_ROWS = 512


class ExemplarPool:
    """The rows of one task that can be exemplars, chosen from `kept` (source row numbers, ascending).

    `draw(pool.key, rows)` gives the key of each row's exemplars.
    """

    def __init__(self, seed: int, task: str, kept: Numbers | RowRanges) -> None:
        self.key = key_of(seed, task, "exemplars")
        runs = max(1, len(kept) // RUN_ROWS)
        if runs > POOL_RUNS:
            chosen = permute(np.arange(POOL_RUNS), runs, key_of(seed, task, "exemplar stretches"))
            places = (np.sort(chosen)[:, None] * RUN_ROWS + np.arange(RUN_ROWS)).ravel()
            self.rows: Numbers = kept[places]
        else:
            self.rows = kept[: POOL_RUNS * RUN_ROWS]

    def __len__(self) -> int:
        return len(self.rows)

    def of_row(self, row: int, count: int) -> tuple[int, ...]:
        """Source row numbers of the first `count` exemplars of `row`; fewer if there are fewer."""
        if not len(self) or count < 1:
            return ()
        own = np.array([row])
        places = exemplar_places(np.array([len(self)]), draw(self.key, own), min(count + 1, len(self)))
        return exclude_own_row(own, self.rows[places], np.array([count]))[0]


def exemplar_places(sizes: Numbers, keys: Keys, count: int) -> Numbers:
    """(len(keys), count) int64 places in pools of `sizes`, distinct within a line; `count` is at most the smallest size.

    The first j places of a line are the same for every `count`.
    """
    places = np.broadcast_to(np.arange(count), (len(keys), count))
    return permute(places, sizes[:, None], keys[:, None])


def exclude_own_row(own: Numbers, candidate_rows: Numbers, counts: Numbers) -> list[tuple[int, ...]]:
    """For each i, the first `counts[i]` rows of line i of `candidate_rows` other than `own[i]`."""
    lines = zip(candidate_rows.tolist(), own.tolist(), counts.tolist(), strict=True)
    return [tuple([row for row in line if row != mine][:count]) for line, mine, count in lines]


def exemplar_rows(seed: int, task: str, row: int, k: int, kept: Numbers) -> tuple[int, ...]:
    """Source row numbers of the first `k` exemplars of `row`, from the training index `kept`; fewer if it has fewer rows.

    Exemplars for a smaller `k` are the first of those for a larger one; `row` itself is never among them.
    """
    return ExemplarPool(seed, task, kept).of_row(row, k)
