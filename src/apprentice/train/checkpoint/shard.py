"""Shards: the part of each tensor of the training state that a worker holds, and writes.

    tensor     [a a a a a a]            one of weight/<name>, exp_avg/<name>, …, flattened
    worker 0   [a a a . . .]            Shard(start=0, numel=3)
    worker 1   [. . . a a a]            Shard(start=3, numel=3)

A state tensor may have another shape and number format than its parameter.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from apprentice.errors import ModelError
from apprentice.train.engine.collectives import Collectives


@dataclass(frozen=True)
class Shard:
    """One worker's shard of a tensor: `numel` elements of the flattened tensor from `start` on. `read()` gives them, (numel,)."""

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    numel: int  # 0 where this worker has none
    read: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * self.numel

    def copy_to_host(self) -> Shard:
        """The shard with a copy of its elements in host memory."""
        values = self.read().detach().to("cpu", self.dtype, copy=True)
        return replace(self, read=lambda: values)


class TensorRange(NamedTuple):
    """`numel` elements of the flattened tensor `key` from `start` on."""

    key: str
    start: int
    numel: int


class RangeReader(Protocol):
    """Anything that reads ranges of tensors, such as a checkpoint's `TensorReader`."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Key → shape of every tensor."""
        ...

    def read_ranges(self, ranges: Iterable[TensorRange]) -> Iterator[Tensor]:
        """The elements of each range in turn, (numel,)."""
        ...


def check_shapes(saved: Mapping[str, tuple[int, ...]], needed: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `ModelError` unless the saved tensors have the keys and shapes of those that the model needs."""
    if odd := sorted(saved.keys() ^ needed.keys()):
        raise ModelError(f"the saved state is not that of this model: {odd[0]!r} is in only one of them; use the run's recipe.")
    for key, shape in needed.items():
        if saved[key] != shape:
            shapes = f"{saved[key]} is not {shape}"
            raise ModelError(f"the saved state is not that of this model: {key!r} {shapes}; use the recipe of the run.")


def has_room_for_copies(shards: Sequence[Shard], collectives: Collectives, free: float) -> bool:
    """Whether all workers can copy their `shards` at once; `free` is the bytes available for it on this worker's machine.

    Workers on the same machine share its memory. All workers must call it, and get the same answer.
    """
    workers = collectives.gather((platform.node(), sum(shard.nbytes for shard in shards), free))
    needed = Counter[str]()
    for machine, size, _ in workers:
        needed[machine] += size
    return all(needed[machine] <= available for machine, _, available in workers)
