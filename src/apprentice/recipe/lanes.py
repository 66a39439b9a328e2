"""Lanes: independent streams of packed rows, and the workers that read each of them.

Window w of the sampling plan is in lane w mod L, and every optimizer step takes equally many rows of each lane. So the order of
examples depends on the number of lanes L and never on the number of workers W. Four lanes and a global batch of 8:

    row of a step        0  1  2  3  4  5  6  7
    of lane              0  1  2  3  0  1  2  3
    read, of 2 workers   A  B  A  B  A  B  A  B      worker A reads lanes 0 and 2 whole, B lanes 1 and 3
    read, of 8 workers   A  B  C  D  E  F  G  H      workers A and E share lane 0, block by block
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lanes:
    """The `count` lanes of a run with `global_batch` rows a step, and at most `max_workers` workers that read them."""

    count: int
    global_batch: int
    max_workers: int

    @property
    def rows(self) -> int:
        """Rows of one lane in a step."""
        return self.global_batch // self.count

    @property
    def block_rows(self) -> int:
        """Rows of a block: those that a worker reads of a lane in a step when workers are most."""
        return self.global_batch // max(self.count, self.max_workers)

    def fit(self, workers: int) -> bool:
        """Whether `workers` workers can read the lanes evenly, on this or on the largest number of workers alike."""
        return self.max_workers % workers == 0 and (workers % self.count == 0 or self.count % workers == 0)

    def of_worker(self, rank: int, workers: int) -> range:
        """The lanes that worker `rank` of `workers` reads: one, or where lanes are more than workers, several whole ones."""
        shared = min(self.count, workers)
        return range(rank % shared, self.count, shared)

    def readers(self, lane: int, workers: int) -> range:
        """Ranks of the workers that read `lane`, in the order in which its blocks are dealt out to them."""
        shared = min(self.count, workers)
        return range(lane % shared, workers, shared)
