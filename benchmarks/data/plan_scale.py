"""Scaling of the sampling plan: its cost and exactness with many tasks, many rows and many positions.

`scale.window_ms`     median time to draw one window of 1,024 positions, at position 0 and at 10**12, for few and many tasks;
                      with many (10,000 tasks, 10**10 rows), each window meets other tasks than the one before
`scale.share_error`   largest |count - n · share| over all tasks and many n up to 10**12
`scale.worker_error`  4,096 workers take windows of 128 positions in turn, and each draws its own: largest difference, over all
                      tasks, between the sum of their draws and the closed form
`scale.plan_mib`      size of the plan as it is sent to each of them: it holds the row groups, not the rows
`scale.step_s`        a step with one second of arithmetic, for 8 to 4,096 workers (simulated; a block costs 8 ms, as measured)
`scale.data_wait`     share of the time that 4,096 workers wait for data, for several numbers of lanes (simulated likewise, with
                      exponential times of blocks); what a splitter really does is measured by `benchmarks.data.lane_speed`

The same is printed on standard error as a table: the cost for each number of workers, the first bottleneck, and its remedy.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import sys
import time
from collections import Counter
from typing import Any

import numpy as np

from apprentice.data.index.row_ranges import RowRanges
from apprentice.data.index.task_index import TaskIndex
from apprentice.data.sampling.plan import Plan
from apprentice.data.sources.locate import Source
from apprentice.recipe import Recipe
from apprentice.tasks.schema import Task
from benchmarks.data.control_cost import (
    ACTOR_TOKENS_PER_S,
    BLOCK_S,
    DISK_BYTES_PER_S,
    LEAST_ACTORS,
    MOST_WAIT,
    checkpoint_bytes,
    fewest_lanes,
    messages,
    rows_that_hide,
    simulate,
    wait_share,
)
from benchmarks.figures import claim_stdout, report

WINDOW = 1024
TURN = 128  # window of each of many workers: the time depends on it, and their draws together do not
GROUP_ROWS = 100_000
FAR = 10**12
ALL_ROWS = 10**10  # rows of the larger number of tasks together
WORKERS = 4096
MANY = (8, 64, 512, WORKERS)
LANES = (1, 16, 32, 64)
ROW_TOKENS, WORKER_TOKENS_PER_S = 2048, 10_000  # a GPU that trains 7 billion parameters
EVERY = 500  # steps between checkpoints
MODELS = {"135M, full": 134_515_008, "7B, LoRA": 40_000_000, "7B, full": 7_000_000_000}


def make_task() -> Task:
    name = "task"
    templates = [{"name": f"t{wording}", "instruction": "Do.", "inverted": wording > 7} for wording in range(10)]
    content = {"name": name, "cluster": "c", "sources": [{"dataset": name}], "answer": "{{ answer_text }}"}
    return Task.model_validate(content | {"metrics": ["exact_match"], "templates": templates})


def make_index(task: str, rows: int) -> TaskIndex:
    groups = (GROUP_ROWS,) * (rows // GROUP_ROWS) + (rows % GROUP_ROWS,)
    source = Source(task, "train", ("none",), (len(groups),), groups, {}, "none")
    none = np.array([], dtype=np.int64)
    kept: Any = RowRanges.all_of(rows)  # as ranges, because a list of so many rows fits into no memory
    return TaskIndex(task, source, None, kept, none, none, 0.0, 0.0, {})


def make_plan(task_count: int, all_rows: int) -> Plan:
    """A plan over `task_count` tasks with `all_rows` rows together, whose sizes are spread evenly over four powers of ten."""
    tasks = [make_task()] * task_count  # compiling templates is not measured
    tasks = [task.model_copy(update={"name": f"task_{number}"}) for number, task in enumerate(tasks)]
    spread = np.geomspace(1, 10_000, task_count)
    sizes = np.maximum(spread * all_rows / spread.sum(), 100).astype(int)
    formats = {"zero_shot": 0.7, "few_shot": 0.2, "inverted": 0.1}
    data = {"tasks": ["made here"], "formats": formats, "mixture": {"cap": 30_000}}
    recipe = Recipe.model_validate({"name": "scale", "model": {"base": "none"}, "data": data, "training": {"steps": 1}})
    return Plan.of(recipe, tasks, {task.name: make_index(task.name, int(rows)) for task, rows in zip(tasks, sizes, strict=True)})


def window_ms(plan: Plan, position: int, runs: int) -> float:
    """Median time in ms over `runs` windows from `position` on, after one that fills the caches."""
    times = []
    for number in range(runs + 1):
        began = time.perf_counter()
        plan.draws(position + number * WINDOW, position + (number + 1) * WINDOW)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def worker_error(plan: Plan) -> float:
    """Largest error of the draws of 4,096 workers, one window each from `FAR` on, in random order.

    Each worker draws from a copy of the plan as it was sent to it; the error is against the plan's closed form.
    """
    first = FAR // TURN
    sent = pickle.loads(pickle.dumps(plan))
    counts: Counter[str] = Counter()
    for worker in np.random.default_rng(0).permutation(WORKERS).tolist():
        start = (first + worker) * TURN
        counts.update(draw.task for draw in sent.draws(start, start + TURN))
    start, stop = first * TURN, (first + WORKERS) * TURN
    return float(max(abs(counts[task] - (plan.count(task, stop) - plan.count(task, start))) for task in plan.tasks))


def scale_table(window: float, plan_mib: float, block_s: float) -> str:
    """The cost of a one-second step for each number of workers, as Markdown."""
    lines = [
        "| workers | messages a step | of them blocks | a step of 1 s lasts | processes that make windows | plan sent to them"
        " | the first to be too slow | what to change |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for workers in MANY:
        sent, lasts = messages(workers, 1.0, EVERY), simulate(workers, 1.0, block_s)
        makers = -(-workers * WORKER_TOKENS_PER_S // ACTOR_TOKENS_PER_S)
        rows = rows_that_hide(workers, block_s, ROW_TOKENS / WORKER_TOKENS_PER_S)
        slow = "the splitter" if lasts > 1.05 else "nothing"
        longer = f"`training.global_batch: {rows * workers:,}` or more ({rows} rows of each worker)"
        change = f"`data.lanes: {fewest_lanes(workers, 1.0, block_s)}`, or {longer}" if lasts > 1.05 else ""
        lines.append(
            f"| {workers:,} | {sent.total:,.0f} | {sent.blocks:,.0f} | {lasts:.2f} s | {makers} of at most"
            f" {max(LEAST_ACTORS, workers):,} | {makers * plan_mib:.0f} MiB | {slow} | {change} |"
        )
    sizes = ", ".join(
        f"{name} {checkpoint_bytes(count) / 1e9:.1f} GB ({checkpoint_bytes(count) / DISK_BYTES_PER_S:.0f} s)"
        for name, count in MODELS.items()
    )
    note = (
        f"Measured: {1000 * block_s:.1f} ms a block (on two idle cores),"
        f" {window:.0f} ms to draw a window of {WINDOW:,} examples of 10,000 tasks, on"
        f" any number of workers. Assumed: {WORKER_TOKENS_PER_S:,} tokens/s of each worker, rows of {ROW_TOKENS:,} tokens, and"
        f" {ACTOR_TOKENS_PER_S:,} tokens/s of a process that makes windows. A checkpoint is as large on any number of workers,"
        f" and each writes its share; with a storage that takes {DISK_BYTES_PER_S / 1e9:g} GB/s from all of them together: {sizes}."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="windows timed for each figure")
    parser.add_argument("--tasks", type=int, default=10_000, help="the larger number of tasks")
    options = parser.parse_args()
    window = 0.0
    for task_count, all_rows, goal in ((40, 10_000_000, 20), (options.tasks, ALL_ROWS, None)):
        plan = make_plan(task_count, all_rows)
        for position in (0, FAR):
            value = window = window_ms(plan, position, options.runs)
            facts = {"tasks": task_count, "rows": all_rows, "position": position, "workers": WORKERS}
            report("scale.window_ms", value, unit="ms", **facts, runs=options.runs, goal=goal)
    plan_mib = len(pickle.dumps(plan)) / 2**20
    report("scale.plan_mib", plan_mib, unit="MiB", tasks=options.tasks, rows=ALL_ROWS, runs=1)
    shares = plan.shares
    positions = [1, 1_000, 1_025, 10**6 + 7, WORKERS * WINDOW, 10**9 + 1, 10**11 + 12_345, FAR, FAR + 4_321]
    error = max(abs(plan.count(task, n) - n * share) for n in positions for task, share in shares.items())
    report("scale.share_error", float(error), unit="examples", tasks=len(shares), positions=positions, runs=1, goal=2)
    report("scale.worker_error", worker_error(plan), unit="examples", tasks=options.tasks, workers=WORKERS, runs=1, goal=0)
    for workers in MANY:
        facts = {"workers": workers, "messages": round(messages(workers, 1.0, EVERY).total), "block_ms": 1000 * BLOCK_S}
        report("scale.step_s", simulate(workers, 1.0, BLOCK_S), unit="s", simulated=True, **facts, runs=1)
    for lanes in LANES:
        value = wait_share(WORKERS, 1.0, BLOCK_S, lanes)
        goal = MOST_WAIT if lanes == LANES[-1] else None
        report("scale.data_wait", value, unit="share", simulated=True, workers=WORKERS, lanes=lanes, runs=1, goal=goal)
    print(scale_table(window, plan_mib, BLOCK_S), file=sys.stderr)


if __name__ == "__main__":
    claim_stdout()
    main()
