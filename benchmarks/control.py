"""What a training step costs besides its arithmetic, for any number of workers.

Messages are counted. Every worker takes one block of rows for each step from one process, Ray Data's splitter, in turn;
`simulate` lets that process serve as many workers as you like. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_S = 0.008  # of one block at the splitter: 100 to 150 blocks/s were measured with Ray 2.60 on two cores (design of the stream)
AHEAD = 2  # steps that a worker asks for before it needs them: train/launch.py's PREFETCHED_STEPS
POLL_S = 2.0  # how often Ray Train's controller asks each worker how it is
LEAST_ACTORS = 4  # that may make windows, where there are CPUs for them; else one for each worker: train/launch.py
ACTOR_TOKENS_PER_S = 700_000  # of one of them, with a fast tokenizer (measured, design of the data stream)
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


def simulate(workers: int, step_s: float, block_s: float, steps: int = 40) -> float:
    """Seconds of a step, when one process hands out the blocks one after another and each worker asks `AHEAD` steps ahead.

    A step begins when every worker has its block and the step before is over. The first steps, which fill what is ahead, are left
    out. Worked example: 100 workers, 0.01 s a block, steps of 0.1 s: a step lasts 1 s, what 100 blocks take.
    """
    free = 0.0  # when the splitter is done with what it was asked for
    asked = [0.0] * AHEAD  # when the blocks of each step are asked for
    began: list[float] = []
    over = 0.0
    for step in range(steps):
        free = max(free, asked[step]) + workers * block_s
        start = max(free, over)
        began.append(start)
        asked.append(start)
        over = start + step_s
    half = steps // 2
    return (began[-1] - began[half]) / (steps - 1 - half)


def rows_that_hide(workers: int, block_s: float, row_s: float) -> int:
    """Rows of a worker in each step from which on the splitter is quicker than the step's arithmetic."""
    return max(1, -(-int(1e6 * workers * block_s) // max(1, int(1e6 * row_s))))


def checkpoint_bytes(trained: int) -> int:
    """Of one checkpoint: weight and Adam's two moments in float32, once, however many workers there are."""
    return 12 * trained
