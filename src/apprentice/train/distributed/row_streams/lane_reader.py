"""A worker's rows: of each step its part of every lane that it reads, one lane after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, TypeVar

import ray.train

from apprentice.recipe import Recipe, data_parallel_size
from apprentice.train.batch import PackedRows
from apprentice.train.distributed.row_streams.lane_streams import lane_names

T = TypeVar("T")
PREFETCHED_STEPS = 2  # batches that Ray Data fetches ahead


def read_rows(recipe: Recipe, rank: int, workers: int) -> Iterator[PackedRows]:
    """The packed rows of worker `rank`; each item holds its rows of one optimizer step. Called once, in a worker of Ray Train.

    Of workers that share rows the first one reads, for all of them; the others have none here.
    """
    sharing, lanes = recipe.training.sequence_parallel, recipe.lanes
    if rank % sharing:
        return iter(())
    rank, workers = rank // sharing, data_parallel_size(workers, sharing)
    mine = lanes.of_worker(rank, workers)
    names = lane_names(lanes.count)
    # The first worker asks for every lane: Ray Train divides a dataset among the workers when it does.
    shards = {lane: ray.train.get_dataset_shard(names[lane]) for lane in (range(lanes.count) if rank == 0 else mine)}
    ahead = 0 if recipe.training.aim.rounds else PREFETCHED_STEPS
    count = lanes.rows // len(lanes.readers(mine[0], workers))
    batches = [
        start_first_batch(shards[lane].iter_batches(batch_size=count, prefetch_batches=ahead, batch_format="numpy"))
        for lane in mine
    ]
    return map(join_lanes, zip(*batches, strict=False))


def join_lanes(parts: Sequence[Mapping[str, Any]]) -> PackedRows:
    """The rows of all `parts`, columns of a step's rows of one lane each."""
    if len(parts) == 1:
        return PackedRows.from_columns(parts[0])
    return PackedRows.from_columns({name: list(chain.from_iterable(part[name] for part in parts)) for name in parts[0]})


def start_first_batch(batches: Iterable[T]) -> Iterator[T]:
    """`batches`, the first of which a thread requests at once, so that the stream starts while the model is loaded."""
    iterator = iter(batches)
    pool = ThreadPoolExecutor(1, "apprentice-first-rows")
    first = pool.submit(lambda: list(islice(iterator, 1)))
    pool.shutdown(wait=False)

    def generate() -> Iterator[T]:
        yield from first.result()
        yield from iterator

    return generate()
