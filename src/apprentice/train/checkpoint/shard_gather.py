"""Gathering of shards: whole tensors put together on the first worker from the pieces that each worker has.

    worker 0  [a a a . . .]┐
    worker 1  [. . . b b b]┴─▶ worker 0  [a a a b b b] ─▶ reshaped ─▶ written

It uses a gloo group of its own, so that a thread can gather while training goes on.
"""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from apprentice.train.engine.collectives import Collectives


@dataclass(frozen=True)
class Shard:
    """One worker's shard of a tensor: the elements from `start` of the flattened tensor. `read()` gives them, (numbers,)."""

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    numbers: int  # of elements; 0 where this worker has none
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size as float32."""
        return 4 * self.numbers

    def copied(self) -> Shard:
        """Returns the piece with a float32 copy of its elements in host memory."""
        values = self.read().detach().to("cpu", torch.float32, copy=True)
        return replace(self, read=lambda: values)


class ShardGatherer:
    """Gathers pieces into whole tensors. Every worker must create one, and call it equally often, with the same keys in order."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._group: Any = dist.new_group(backend="gloo") if collectives.workers > 1 else None

    def whole(self, pieces: Sequence[Shard]) -> Iterator[tuple[str, Tensor]]:
        """Yields (key, float32 tensor) on the first worker, nothing on the others. All workers must exhaust the iterator."""
        places = [(piece.start, piece.numbers) for piece in pieces]
        told: list[Any] = [places] * self._collectives.workers
        if self._group is not None:
            dist.gather_object(places, told if self._collectives.rank == 0 else None, dst=0, group=self._group)
        for number, piece in enumerate(pieces):
            mine = piece.read().detach().to("cpu", torch.float32) if piece.numbers else torch.empty(0)
            if self._collectives.rank == 0:
                yield piece.key, self._put_together(mine, piece, [of_one[number] for of_one in told])
            elif piece.numbers:
                dist.send(mine.contiguous(), dst=0, group=self._group)

    def _put_together(self, mine: Tensor, piece: Shard, places: list[tuple[int, int]]) -> Tensor:
        flat = torch.empty(math.prod(piece.shape), dtype=torch.float32)
        flat[piece.start : piece.start + piece.numbers] = mine
        for rank, (start, numbers) in enumerate(places):
            if rank > 0 and numbers:
                dist.recv(flat[start : start + numbers], src=rank, group=self._group)
        return flat.view(piece.shape)


def room_for_copies(pieces: Sequence[Shard], collectives: Collectives, free: float) -> bool:
    """Whether all workers can copy their `pieces` at once; `free` is the bytes available for it on this worker's machine.

    Workers on the same machine share its memory. All workers must call it, and get the same answer.
    """
    told = collectives.gather((platform.node(), sum(piece.nbytes for piece in pieces), free))
    needed = Counter[str]()
    for machine, size, _ in told:
        needed[machine] += size
    return all(needed[machine] <= there for machine, _, there in told)
