"""Streams of lanes under Ray: who reads which, the same steps on any number of workers, and a run that loses one of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.train
from ray.train import DataConfig

from apprentice.data.stream import make_corpus, repartition_by_step
from apprentice.recipe import Recipe, load_recipe
from apprentice.run.folder import open_run
from apprentice.train.distributed import driver as launch
from apprentice.train.distributed.row_streams.lane_reader import read_rows
from apprentice.train.distributed.row_streams.lane_streams import LaneConfig, actors_of_lane, lane_names, stream_options
from tests.support.recipes import tiny_recipe
from tests.train.distributed.row_streams.lane_runs import examples_of_plan, steps_of

GLOBAL_BATCH = 8
ROOT = Path(__file__).parents[4]


def recipe(lanes: int, workers: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "model": {"base": "b"},
            "data": {"tasks": ["sst2"], "lanes": lanes},
            "training": {"workers": workers, "steps": 5, "global_batch": GLOBAL_BATCH},
        }
    )


def test_actors_that_make_rows() -> None:
    """Four together or one a worker, as far as there is room beside one CPU for Ray Data's tasks; at least one a lane."""
    assert [actors_of_lane(1, workers, 100) for workers in (1, 4, 9)] == [4, 4, 9]
    assert [actors_of_lane(1, 8, spare) for spare in (0, 2, 5)] == [1, 1, 4]
    assert [actors_of_lane(lanes, 8, 100) for lanes in (2, 3, 16)] == [4, 3, 1]
    assert [actors_of_lane(4, 64, spare) for spare in (5, 8, 9)] == [1, 1, 2]


def test_of_workers_that_share_rows_the_first_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lanes and eight workers, of whom neighbours share rows: four groups, so two of them read each lane."""

    def split(_: Any, datasets: dict[str, Any], parts: int, *__: Any) -> list[dict[str, Any]]:
        return [{name: (name, part, parts) for name in datasets} for part in range(parts)]

    monkeypatch.setattr(DataConfig, "configure", split)
    made = Recipe.model_validate(
        recipe(2, 8).model_dump(exclude_unset=True)
        | {"training": {"workers": 8, "steps": 5, "global_batch": GLOBAL_BATCH, "sequence_parallel": 2}}
    )
    config = LaneConfig(made.lanes, stream_options(made, 100), made.training.sequence_parallel)
    names = lane_names(2)
    divided = config.configure(dict.fromkeys(names), 8, None, None)
    assert [divided[rank][names[rank // 2 % 2]][1:] for rank in (0, 2, 4, 6)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    requests: list[str] = []
    monkeypatch.setattr(ray.train, "get_dataset_shard", requests.append)
    for rank in (1, 3, 5, 7):
        assert list(read_rows(made, rank, 8)) == []
    assert not requests


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "workers"), [(2, 4), (4, 2)])
def test_each_step_has_the_same_rows_of_every_lane(ray_cluster: None, lanes: int, workers: int) -> None:
    """As Ray Data deals them out: of each lane in order, and each worker its part."""
    import ray.data

    made = recipe(lanes, workers)
    config = LaneConfig(made.lanes, stream_options(made, 100))
    readers: list[list[Any]] = [[] for _ in range(workers)]
    for lane, name in enumerate(lane_names(lanes)):
        rows = ray.data.from_arrow(pa.table({"row": [100 * lane + number for number in range(40)]}))
        divided = config.configure({name: repartition_by_step(rows, made)}, workers, None, None)
        assert [list(of_worker) for of_worker in divided] == [[name]] * workers
        for rank in made.lanes.readers(lane, workers):
            readers[rank].append(divided[rank][name])
    assert {len(parts) for parts in readers} == {max(1, lanes // workers)}

    def read(parts: list[Any]) -> list[list[int]]:
        size = GLOBAL_BATCH // workers // len(parts)
        batches = [part.iter_batches(batch_size=size, prefetch_batches=0, batch_format="numpy") for part in parts]
        return [[int(row) for batch in step for row in batch["row"]] for step in islice(zip(*batches, strict=False), 4)]

    with ThreadPoolExecutor(workers) as pool:
        of_workers = list(pool.map(read, readers))
    rows_of_lane = GLOBAL_BATCH // lanes
    for step, parts in enumerate(zip(*of_workers, strict=True)):
        expected = [100 * lane + step * rows_of_lane + row for lane in range(lanes) for row in range(rows_of_lane)]
        assert sorted(row for part in parts for row in part) == expected


def killing_a_stream(marker: Path, before: int) -> Callable[[launch.WorkerJob], None]:
    """A worker function that ends the process which deals out lane 1's rows, once, when step `before` takes its rows."""

    def work(job: Any) -> None:
        import ray
        import ray.train

        from apprentice.train import worker as training_worker
        from apprentice.train.distributed import ray_worker

        inner = training_worker.run_worker

        def run_worker(config: Any, restored: Any, rows: Any, *rest: Any, **more: Any) -> Any:
            def watched() -> Any:
                for step, batch in enumerate(rows, start=restored.state.step + 1 if restored else 1):
                    if step == before and ray.train.get_context().get_world_rank() == 1 and not marker.exists():
                        marker.touch()
                        ray.kill(ray.train.get_dataset_shard("train-1")._coord_actor)
                    yield batch

            return inner(config, restored, watched(), *rest, **more)

        training_worker.run_worker = run_worker
        ray_worker.work(job)

    return work


@pytest.mark.slow
def test_a_lane_whose_stream_fails_alone_is_started_again(
    ray_cluster: None, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"data__lanes": 2, "training__resources": {"cpus": 0.5}, "training__max_failures": 1}
    made = load_recipe(tiny_recipe(tmp_path, tiny_model, **values, training__steps=9, training__checkpoint={"every_steps": 2}))
    run = open_run(made)
    corpus = make_corpus(made, run)
    monkeypatch.setattr(launch, "work", killing_a_stream(tmp_path / "killed", 3))
    result = launch.train(made, run, corpus, progress=lambda _: None)
    assert (tmp_path / "killed").exists()
    assert (result.steps, result.restarts) == (9, 1)
    steps = steps_of(run)
    second = [step["step"] for step in steps if step["attempt"] == 2]
    assert second == list(range(second[0], 10))
    assert second[0] in (3, 5, 7)  # after a checkpoint; a few batches are fetched ahead
    expected = examples_of_plan(corpus, 9)
    assert all(step["examples"] == expected[step["step"] - 1] for step in steps)


@pytest.mark.long
@pytest.mark.parametrize(("lanes", "numbers"), [(1, (1, 2, 4)), (2, (4, 1, 2)), (4, (2, 4, 1))])
def test_a_run_goes_on_with_other_numbers_of_workers(
    tmp_path: Path, tiny_model: Path, lanes: int, numbers: tuple[int, ...]
) -> None:
    program = [sys.executable, "-m", "tests.train.distributed.row_streams.lane_runs", str(tmp_path), str(tiny_model)]
    ended = subprocess.run([*program, str(lanes), *map(str, numbers)], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    seen = json.loads(ended.stdout.splitlines()[-1])
    assert [step["workers"] for step in seen["steps"]] == sorted((step["workers"] for step in seen["steps"]), key=numbers.index)
    assert {step["workers"] for step in seen["steps"]} == set(numbers)
    assert {step["step"] for step in seen["steps"]} == set(range(1, len(seen["plan"]) + 1))
    assert all(step["examples"] == seen["plan"][step["step"] - 1] for step in seen["steps"])
