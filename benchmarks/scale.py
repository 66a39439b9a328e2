"""What the plan costs and how exact it is when there are many tasks, many rows and many positions behind it.

`scale.window_ms`     median time to draw one window of 1,024 positions, at position 0 and at 10**12, for few and many tasks;
                      with many, each window meets other tasks than the one before
`scale.share_error`   largest |count - n · share| over all tasks and several n up to 10**12
The plan is a pure function, so neither depends on the number of workers.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from figures import report

from apprentice.data.index import TaskIndex
from apprentice.data.plan import Plan
from apprentice.data.sources import Source
from apprentice.recipe import Recipe
from apprentice.tasks.schema import Task

WINDOW = 1024
GROUP_ROWS = 1000
FAR = 10**12


def make_task(number: int) -> Task:
    name = f"task_{number}"
    templates = [{"name": f"t{wording}", "instruction": "Do.", "inverted": wording > 7} for wording in range(10)]
    content = {"name": name, "cluster": "c", "sources": [{"dataset": name}], "answer": "{{ answer_text }}"}
    return Task.model_validate(content | {"metrics": ["exact_match"], "templates": templates})


def make_index(task: str, rows: int) -> TaskIndex:
    groups = (GROUP_ROWS,) * (rows // GROUP_ROWS) + (rows % GROUP_ROWS,)
    source = Source(task, "train", ("none",), (len(groups),), groups, {}, "none")
    none = np.array([], dtype=np.int64)
    return TaskIndex(task, source, None, np.arange(rows), none, none, 0.0, 0.0, {})


def make_plan(task_count: int, most_rows: int) -> Plan:
    """Sizes spread evenly over the powers of ten from 100 to `most_rows`."""
    tasks = [make_task(number) for number in range(task_count)]
    sizes = np.geomspace(100, most_rows, task_count).astype(int)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="windows timed for each figure")
    parser.add_argument("--tasks", type=int, default=10_000, help="the larger number of tasks")
    options = parser.parse_args()
    for task_count, most_rows, goal in ((40, 1_000_000, 20), (options.tasks, 100_000, None)):
        plan = make_plan(task_count, most_rows)
        for position in (0, FAR):
            value = window_ms(plan, position, options.runs)
            report("scale.window_ms", value, unit="ms", tasks=task_count, position=position, runs=options.runs, goal=goal)
    shares = plan.shares
    positions = [1, 1_000, 10**6 + 7, 10**9 + 1, FAR, FAR + 4_321]
    error = max(abs(plan.count(task, n) - n * share) for n in positions for task, share in shares.items())
    report("scale.share_error", float(error), unit="examples", tasks=len(shares), positions=positions, runs=1, goal=2)


if __name__ == "__main__":
    main()
