"""Gathering of shards: whole tensors put together on the first worker from the shards that each worker has.

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
    """One worker's shard of a tensor: `numel` elements of the flattened tensor from `start` on. `read()` gives them, (numel,)."""

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    numel: int  # 0 where this worker has none
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size as float32."""
        return 4 * self.numel

    def copy_to_host(self) -> Shard:
        """The shard with a float32 copy of its elements in host memory."""
        values = self.read().detach().to("cpu", torch.float32, copy=True)
        return replace(self, read=lambda: values)


class ShardGatherer:
    """Gathers shards into whole tensors. Every worker must create one, and call it equally often, with the same keys in order."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._group: Any = dist.new_group(backend="gloo") if collectives.workers > 1 else None

    def gather(self, shards: Sequence[Shard]) -> Iterator[tuple[str, Tensor]]:
        """Yields (key, float32 tensor) on the first worker, nothing on the others. All workers must exhaust the iterator."""
        places = [(shard.start, shard.numel) for shard in shards]
        places_of_workers: list[Any] = [places] * self._collectives.workers
        if self._group is not None:
            dist.gather_object(places, places_of_workers if self._collectives.rank == 0 else None, dst=0, group=self._group)
        for number, shard in enumerate(shards):
            mine = shard.read().detach().to("cpu", torch.float32) if shard.numel else torch.empty(0)
            if self._collectives.rank == 0:
                yield shard.key, self._put_together(mine, shard, [of_one[number] for of_one in places_of_workers])
            elif shard.numel:
                dist.send(mine.contiguous(), dst=0, group=self._group)

    def _put_together(self, mine: Tensor, shard: Shard, places: list[tuple[int, int]]) -> Tensor:
        flat = torch.empty(math.prod(shard.shape), dtype=torch.float32)
        flat[shard.start : shard.start + shard.numel] = mine
        for rank, (start, numel) in enumerate(places):
            if rank > 0 and numel:
                dist.recv(flat[start : start + numel], src=rank, group=self._group)
        return flat.view(shard.shape)


def has_room_for_copies(shards: Sequence[Shard], collectives: Collectives, free: float) -> bool:
    """Whether all workers can copy their `shards` at once; `free` is the bytes available for it on this worker's machine.

    Workers on the same machine share its memory. All workers must call it, and get the same answer.
    """
    workers = collectives.gather((platform.node(), sum(shard.nbytes for shard in shards), free))
    needed = Counter[str]()
    for machine, size, _ in workers:
        needed[machine] += size
    return all(needed[machine] <= available for machine, _, available in workers)
