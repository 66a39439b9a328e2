"""Checkpoints written and read as a whole, for tests: by one process, or from what all workers of an engine hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from apprentice.run.fence import FenceToken
from apprentice.storage import Folder
from apprentice.train.checkpoint.format import Checkpoint
from apprentice.train.checkpoint.shard import Shard, TensorRange
from apprentice.train.checkpoint.shard_writer import write_checkpoint
from apprentice.train.engine.collectives import Collectives
from apprentice.train.state import State


def whole_shards(tensors: Iterable[tuple[str, Tensor]]) -> list[Shard]:
    """The shards of a worker that holds everything."""
    return [Shard(key, tuple(value.shape), 0, value.numel(), value.flatten, value.dtype) for key, value in tensors]


def save(
    folder: Folder, tensors: Iterable[tuple[str, Tensor]], state: State, facts: dict[str, Any], token: FenceToken | None = None
) -> Checkpoint:
    """Writes a checkpoint from this process alone."""
    checkpoint = write_checkpoint(folder, whole_shards(tensors), state, facts, token)
    assert checkpoint is not None
    return checkpoint


def state_of(engine: Any) -> dict[str, Tensor]:
    """The whole state of an engine by key, float32, on every worker; all must call it."""
    state: dict[str, Tensor] = {}
    for shards in Collectives().gather([(shard.key, shard.shape, shard.start, shard.read().cpu()) for shard in engine.shards()]):
        for key, shape, start, values in shards:
            whole = state.setdefault(key, torch.full(shape, float("nan")))
            whole.view(-1)[start : start + len(values)] = values
    return state


class StateReader:
    """Reads ranges of tensors in memory, as a checkpoint's reader does."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {key: tuple(value.shape) for key, value in tensors.items()}

    def read_ranges(self, ranges: Iterable[TensorRange]) -> Iterator[Tensor]:
        for key, start, numel in ranges:
            yield self._tensors[key].flatten()[start : start + numel]


class _ThreadCollectives:
    """Collectives of workers that are threads of one process."""

    def __init__(self, rank: int, workers: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.workers = rank, workers
        self._values, self._barrier = values, barrier

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait(60)
        gathered = list(self._values)
        self._barrier.wait(60)
        return gathered


def run_workers(workers: int, work: Callable[[Any], Any]) -> list[Any]:
    """What `work(collectives)` returns in each of the threads `worker-0`, `worker-1` …, which take each other for workers."""
    barrier, values = threading.Barrier(workers), [None] * workers
    results: list[Any] = [None] * workers

    def run(rank: int) -> None:
        try:
            results[rank] = work(_ThreadCollectives(rank, workers, values, barrier))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"worker-{rank}") for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
