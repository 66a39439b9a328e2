"""Forward passes over all workers' micro-batches, equally many on each, since ZeRO-3 gathers weights in every one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from apprentice.train.batch import MicroBatch
from apprentice.train.engine.collectives import Collectives


class ForwardEngine(Protocol):
    """Anything that computes the summed loss of a micro-batch without learning from it."""

    def validation_nll(self, batch: MicroBatch) -> float:
        """Summed loss of `batch` on this worker."""
        ...


def sum_losses(
    engine: ForwardEngine, mine: Sequence[MicroBatch], spare: MicroBatch, rounds: int, collectives: Collectives
) -> float:
    """The summed losses of all workers' micro-batches; one with fewer than `rounds` repeats `spare`, uncounted."""
    total = 0.0
    for number in range(rounds):
        value = engine.validation_nll(mine[number] if number < len(mine) else spare)
        total += value if number < len(mine) else 0.0
    return collectives.sum([total])[0]
