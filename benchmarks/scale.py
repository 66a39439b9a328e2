"""What the plan costs and how exact it is when there are many tasks, many rows and many positions behind it.

`scale.window_ms`     median time to draw one window of 1,024 positions, at position 0 and at 10**12, for few and many tasks;
                      with many (10,000 tasks, 10**10 rows), each window meets other tasks than the one before
`scale.share_error`   largest |count - n · share| over all tasks and many n up to 10**12
`scale.worker_error`  4,096 workers take windows in turn, and each draws its own by itself: largest difference, over all tasks,
                      between what they drew together and the closed form
`scale.plan_mib`      the plan as it travels to each of them: it holds the row groups, not the rows
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import time
from collections import Counter
from typing import Any

import numpy as np
from figures import report

from apprentice.data.index import TaskIndex
from apprentice.data.plan import Plan
from apprentice.data.row_ranges import RowRanges
from apprentice.data.sources import Source
from apprentice.recipe import Recipe
from apprentice.tasks.schema import Task

WINDOW = 1024
GROUP_ROWS = 100_000
FAR = 10**12
ALL_ROWS = 10**10  # of the larger number of tasks together
WORKERS = 4096


def make_task() -> Task:
    name = "task"
    templates = [{"name": f"t{wording}", "instruction": "Do.", "inverted": wording > 7} for wording in range(10)]
    content = {"name": name, "cluster": "c", "sources": [{"dataset": name}], "answer": "{{ answer_text }}"}
    return Task.model_validate(content | {"metrics": ["exact_match"], "templates": templates})


def make_index(task: str, rows: int) -> TaskIndex:
    groups = (GROUP_ROWS,) * (rows // GROUP_ROWS) + (rows % GROUP_ROWS,)
    source = Source(task, "train", ("none",), (len(groups),), groups, {}, "none")
    none = np.array([], dtype=np.int64)
    kept: Any = RowRanges.all_of(rows)  # no machine could list them
    return TaskIndex(task, source, None, kept, none, none, 0.0, 0.0, {})


def make_plan(task_count: int, all_rows: int) -> Plan:
    """Sizes spread evenly over four powers of ten, `all_rows` together."""
    tasks = [make_task()] * task_count  # compiling their wordings is no part of what is measured
    tasks = [task.model_copy(update={"name": f"task_{number}"}) for number, task in enumerate(tasks)]
    spread = np.geomspace(1, 10_000, task_count)
    sizes = np.maximum(spread * all_rows / spread.sum(), 100).astype(int)
    formats = {"zero_shot": 0.7, "few_shot": 0.2, "inverted": 0.1}
    data = {"tasks": ["made here"], "formats": formats, "mixture": {"cap": 30_000}}
    recipe = Recipe.model_validate({"name": "scale", "model": {"base": "none"}, "data": data, "training": {"steps": 1}})
    return Plan.of(recipe, tasks, {task.name: make_index(task.name, int(rows)) for task, rows in zip(tasks, sizes, strict=True)})


def window_ms(plan: Plan, position: int, runs: int) -> float:
    """The median over `runs` windows from `position` on, after one that fills the caches."""
    times = []
    for number in range(runs + 1):
        began = time.perf_counter()
        plan.draws(position + number * WINDOW, position + (number + 1) * WINDOW)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def worker_error(plan: Plan) -> float:
    """What 4,096 workers draw, one window each from `FAR` on, in no order; each draws from the plan as it was sent to it."""
    first = FAR // WINDOW
    sent = pickle.loads(pickle.dumps(plan))
    seen: Counter[str] = Counter()
    for worker in np.random.default_rng(0).permutation(WORKERS).tolist():
        start = (first + worker) * WINDOW
        seen.update(draw.task for draw in sent.draws(start, start + WINDOW))
    start, stop = first * WINDOW, (first + WORKERS) * WINDOW
    return float(max(abs(seen[task] - (plan.count(task, stop) - plan.count(task, start))) for task in plan.tasks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="windows timed for each figure")
    parser.add_argument("--tasks", type=int, default=10_000, help="the larger number of tasks")
    options = parser.parse_args()
    for task_count, all_rows, goal in ((40, 10_000_000, 20), (options.tasks, ALL_ROWS, None)):
        plan = make_plan(task_count, all_rows)
        for position in (0, FAR):
            value = window_ms(plan, position, options.runs)
            facts = {"tasks": task_count, "rows": all_rows, "position": position, "workers": WORKERS}
            report("scale.window_ms", value, unit="ms", **facts, runs=options.runs, goal=goal)
    report("scale.plan_mib", len(pickle.dumps(plan)) / 2**20, unit="MiB", tasks=options.tasks, rows=ALL_ROWS, runs=1)
    shares = plan.shares
    positions = [1, 1_000, 1_025, 10**6 + 7, WORKERS * WINDOW, 10**9 + 1, 10**11 + 12_345, FAR, FAR + 4_321]
    error = max(abs(plan.count(task, n) - n * share) for n in positions for task, share in shares.items())
    report("scale.share_error", float(error), unit="examples", tasks=len(shares), positions=positions, runs=1, goal=2)
    report("scale.worker_error", worker_error(plan), unit="examples", tasks=options.tasks, workers=WORKERS, runs=1, goal=0)


if __name__ == "__main__":
    main()
