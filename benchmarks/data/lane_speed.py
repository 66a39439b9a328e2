"""Blocks of rows a second that Ray Data's splitters hand out to reading processes, with one, two and four lanes.

`scale.blocks_per_s`  blocks of one tiny row a second to all readers together. The blocks are made beforehand, so that only their
                      way from the splitters to the readers is measured. On few cores readers and splitters share them, and more
                      lanes are hardly faster; `cpu_ms` says what a block costs its splitter in time of its own core
`scale.block_cpu_ms`  that time, for one lane: its inverse is the most blocks a second of a splitter with a core for itself

`scale.splitters_per_s` blocks a second that all splitters together would hand out with a core each: lanes through that time

    python -m benchmarks.data.lane_speed [--blocks 1200] [--readers 4] [--runs 3] [--lanes 1 2 4] [--pin]

With `--pin` each splitter runs on one core, the lanes' in turn, and goes before the readers there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import ray
import ray.data

from apprentice.data.stream import repartition_by_step
from apprentice.ray_cluster.session import ray_session
from apprentice.recipe import Recipe
from apprentice.train.distributed.row_streams.lane_streams import LaneConfig, lane_names, stream_options
from benchmarks.figures import claim_stdout, report

LANES = (1, 2, 4)
WARM_UP = 40  # blocks that each reader takes before its time counts


class Rate(NamedTuple):
    """Blocks a second of all lanes together, and milliseconds of processor time that one costs its splitter."""

    blocks_per_s: float
    cpu_ms: float


class Reader:
    """A process that reads its part of each of its lanes, as a training worker does."""

    def __init__(self, parts: list[Any], is_last: bool) -> None:
        if is_last:
            os.nice(19)  # after the splitters
        batches = [part.iter_batches(batch_size=1, prefetch_batches=2, batch_format="numpy") for part in parts]
        self._steps = zip(*batches, strict=False)

    def take(self, steps: int) -> int:
        """Takes the blocks of `steps` steps, or of those that are left; returns how many steps they were."""
        return sum(1 for _ in zip(range(steps), self._steps, strict=False))


def recipe_of(lanes: int, readers: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "lanes",
            "model": {"base": "none"},
            "data": {"tasks": ["made here"], "lanes": lanes},
            "training": {"workers": readers, "steps": 1, "global_batch": readers},
        }
    )


def pin(core: int) -> None:
    """Keeps all threads of this process on `core`."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def measure(lanes: int, readers: int, blocks: int, *, is_pinned: bool) -> Rate:
    """The rate over `blocks` blocks, dealt out to `readers` readers."""
    recipe = recipe_of(lanes, readers)
    config = LaneConfig(recipe.lanes, stream_options(recipe, 8))
    parts: list[list[Any]] = [[] for _ in range(readers)]
    spare = 4 * readers  # the last blocks of a stream are divided anew
    for lane, name in enumerate(lane_names(lanes)):
        table = pa.table({"row": list(range((blocks + WARM_UP * readers + spare) // lanes))})
        rows = repartition_by_step(ray.data.from_arrow(table), recipe).materialize()
        divided = config.configure({name: rows}, readers, None, None)
        for rank in recipe.lanes.readers(lane, readers):
            parts[rank].append(divided[rank][name])
    splitters = {part._actor_id: part for part in (part._coord_actor for of_reader in parts for part in of_reader)}.values()

    if is_pinned:
        cores = sorted(os.sched_getaffinity(0))
        for number, actor in enumerate(splitters):
            ray.get(actor.__ray_call__.remote(lambda _, core: pin(core), cores[number % len(cores)]))

    def splitter_cpu_s() -> float:
        return sum(ray.get([actor.__ray_call__.remote(lambda _: time.process_time()) for actor in splitters]))

    processes: list[Any] = [ray.remote(Reader).options(num_cpus=0).remote(of_reader, is_pinned) for of_reader in parts]
    in_a_step = len(parts[0])
    ray.get([process.take.remote(WARM_UP // in_a_step) for process in processes])
    before, began = splitter_cpu_s(), time.perf_counter()
    taken = in_a_step * sum(ray.get([process.take.remote(blocks // readers // in_a_step) for process in processes]))
    seconds, cpu_s = time.perf_counter() - began, splitter_cpu_s() - before
    for process in processes:
        ray.kill(process)
    return Rate(taken / seconds, 1000 * cpu_s / taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=1200, help="blocks of all lanes together whose time is measured")
    parser.add_argument("--readers", type=int, default=4, help="reading processes; a multiple of four")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--lanes", type=int, nargs="+", default=LANES)
    parser.add_argument("--pin", action="store_true", help="give each splitter one core, the lanes in turn")
    options = parser.parse_args()
    rates: dict[int, list[Rate]] = {lanes: [] for lanes in options.lanes}
    with ray_session():
        for _ in range(options.runs):
            for lanes in options.lanes:  # interleaved, because the speed of a machine drifts
                rates[lanes].append(measure(lanes, options.readers, options.blocks, is_pinned=options.pin))
    facts = {"readers": options.readers, "cores": os.cpu_count(), "runs": options.runs, "pinned": options.pin}
    for lanes, measured in rates.items():
        cpu_ms = statistics.median(rate.cpu_ms for rate in measured)
        value = statistics.median(rate.blocks_per_s for rate in measured)
        report("scale.blocks_per_s", value, unit="1/s", lanes=lanes, cpu_ms=round(cpu_ms, 2), **facts)
        report("scale.splitters_per_s", lanes * 1000 / cpu_ms, unit="1/s", lanes=lanes, **facts)
        if lanes == 1:
            report("scale.block_cpu_ms", cpu_ms, unit="ms", **facts)


if __name__ == "__main__":
    claim_stdout()
    main()
