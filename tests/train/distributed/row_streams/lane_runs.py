"""Trainings of a tiny model with several lanes, on a Ray with CPUs enough for four of them: run as a program by a `long` test.

    python -m tests.train.distributed.row_streams.lane_runs FOLDER MODEL LANES WORKERS…

trains one run on each number of workers in turn. All but the last are killed after a few steps, and the next one goes on from their
newest checkpoint. Prints the records of all steps, and the examples that they ought to have, as JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apprentice.data.corpus import Corpus
from apprentice.run.folder import Run

STEPS = 5  # for each number of workers


def steps_of(run: Run) -> list[dict[str, Any]]:
    """The records of all steps of a run."""
    lines = (run.folder / "steps.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def examples_of_plan(corpus: Corpus, steps: int) -> list[list[int]]:
    """Plan positions of each step, from the windows themselves: row r of a step is the next one of lane r mod lanes."""
    from apprentice.data.window import WindowRenderer

    lanes, renderer = corpus.recipe.lanes, WindowRenderer(corpus)

    def lane(first: int) -> Any:
        for window in itertools.count(first, lanes.count):
            yield from renderer.window(window)["examples"]

    streams = [lane(number) for number in range(lanes.count)]
    return [
        [int(position) for row in range(lanes.global_batch) for position in next(streams[row % lanes.count])] for _ in range(steps)
    ]


def dying(before: int) -> Callable[[Any], None]:
    """A worker function whose last worker is killed when step `before` takes its rows."""

    def work(job: Any) -> None:
        import os
        import signal

        import ray.train

        from apprentice.train import worker as training_worker
        from apprentice.train.distributed import ray_worker

        inner = training_worker.run_worker

        def run_worker(config: Any, restored: Any, rows: Any, *rest: Any, **more: Any) -> Any:
            def watched() -> Any:
                for step, batch in enumerate(rows, start=restored.state.step + 1 if restored else 1):
                    context = ray.train.get_context()
                    if step == before and context.get_world_rank() == context.get_world_size() - 1:
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield batch

            return inner(config, restored, watched(), *rest, **more)

        training_worker.run_worker = run_worker
        ray_worker.work(job)

    return work


def main(folder: Path, model: Path, lanes: int, numbers: list[int]) -> None:
    """Trains, and prints the steps of the run and those of its plan."""
    from apprentice.data.stream import make_corpus
    from apprentice.errors import TrainingError
    from apprentice.ray_cluster.session import start_local_ray
    from apprentice.recipe import load_recipe
    from apprentice.run.folder import open_run
    from apprentice.train.distributed import driver as launch
    from tests.support.recipes import tiny_recipe

    session = tempfile.mkdtemp(prefix="apprentice-ray-", dir="/tmp")  # short: Unix socket paths hold 107 characters
    start_local_ray(max(numbers) + lanes + 1, configure_logging=False, object_store_memory=512 * 2**20, _temp_dir=session)
    steps, last = STEPS * len(numbers), dying(0)
    for place, workers in enumerate(numbers, start=1):
        values: dict[str, Any] = {"data__lanes": lanes, "training__workers": workers, "training__global_batch": 8}
        values |= {"training__steps": steps, "training__max_failures": 0, "training__checkpoint": {"every_steps": 2}}
        made = load_recipe(tiny_recipe(folder, model, **values))
        run = open_run(made)
        corpus = make_corpus(made, run)
        launch.work = dying(STEPS * place) if place < len(numbers) else last
        try:
            launch.train(made, run, corpus, progress=lambda _: None)
        except TrainingError as error:
            print(f"{lanes} lanes, {workers} workers: {error}", file=sys.stderr)
    print(json.dumps({"steps": steps_of(run), "plan": examples_of_plan(corpus, steps)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), [int(number) for number in sys.argv[4:]])
