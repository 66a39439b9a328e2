"""Model of the control cost of a training step, apart from its arithmetic, for any number of workers.

It counts messages, and simulates the processes that hand out blocks of rows: for each step, every worker takes one block from its
lane's splitter, one after another. With one lane that is one process for all workers; `data.lanes` makes it many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK_S = 0.008  # seconds of the splitter for one block: 100 to 150 blocks/s were measured with Ray 2.60 on two cores
AHEAD = 2  # steps that a worker requests in advance: `PREFETCHED_STEPS` in train/distributed/row_streams/lane_reader.py
MOST_WAIT = 0.02  # share of the time that workers may wait for data
POLL_S = 2.0  # seconds between two polls of each worker by Ray Train's controller
LEAST_ACTORS = 4  # limit on actors that make windows, or one a worker if these are more: train/distributed/driver.py
ACTOR_TOKENS_PER_S = 700_000  # of one such actor with a fast tokenizer, as measured
DISK_BYTES_PER_S = 1e9  # an NVMe disk, or an object store written in parts


@dataclass(frozen=True)
class Messages:
    """Control messages of one optimizer step, between all processes together."""

    blocks: float  # workers to the splitter
    records: float  # the first worker to the driver's mailbox
    reports: float  # workers to Ray Train's controller, at a checkpoint, spread over its steps
    polls: float  # the controller to workers

    @property
    def total(self) -> float:
        return self.blocks + self.records + self.reports + self.polls


def messages(workers: int, step_s: float, every_steps: int) -> Messages:
    return Messages(workers, 1.0, workers / every_steps, workers * step_s / POLL_S)


def simulate(
    workers: int, step_s: float, block_s: float, lanes: int = 1, steps: int = 40, rng: np.random.Generator | None = None
) -> float:
    """Seconds of a step if each lane's splitter hands out its blocks in turn and each worker requests `AHEAD` steps in advance.

    A step begins when every worker has its block and the step before is over. The first half of the steps, in which the
    prefetch buffer fills, is left out. Worked example: with 100 workers, 0.01 s a block and 0.1 s of arithmetic a step, a step
    takes 1 s, the time of 100 blocks; with 4 lanes, 0.25 s. With `rng` the time of a block varies: it is exponential, `block_s` on
    average, and a step waits for the slowest lane.
    """
    free = np.zeros(lanes)  # times at which the splitters have served all requests
    request_times = [0.0] * AHEAD  # time at which the blocks of each step are requested
    began: list[float] = []
    over, blocks = 0.0, workers / lanes
    for step in range(steps):
        served_s = blocks * block_s if rng is None else rng.gamma(blocks, block_s, lanes)
        free = np.maximum(free, request_times[step]) + served_s
        start = max(float(free.max()), over)
        began.append(start)
        request_times.append(start)
        over = start + step_s
    half = steps // 2
    return (began[-1] - began[half]) / (steps - 1 - half)


def wait_share(workers: int, step_s: float, block_s: float, lanes: int, steps: int = 2000) -> float:
    """Share of the time that workers wait for data, where the times of blocks vary; from a simulation of `steps` steps."""
    return 1 - step_s / simulate(workers, step_s, block_s, lanes, steps, np.random.default_rng(0))


def fewest_lanes(workers: int, step_s: float, block_s: float, most_wait: float = MOST_WAIT) -> int:
    """The fewest lanes that divide `workers` and keep them waiting for data less than `most_wait` of the time."""
    divisors = [lanes for lanes in range(1, workers + 1) if workers % lanes == 0]
    return next((lanes for lanes in divisors if wait_share(workers, step_s, block_s, lanes) < most_wait), workers)


def rows_that_hide(workers: int, block_s: float, row_s: float) -> int:
    """The fewest rows of a worker in a step for which the arithmetic takes longer than the splitter."""
    return max(1, -(-int(1e6 * workers * block_s) // max(1, int(1e6 * row_s))))


def checkpoint_bytes(trained: int) -> int:
    """Size of a checkpoint in bytes: weight and Adam's two moments in float32, independent of the number of workers."""
    return 12 * trained
