"""What is asked of a cluster against what is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from apprentice.errors import ResourcesError
from apprentice.recipe import Recipe, WorkerRange
from apprentice.train.distributed.resources import GIB, check_resources, export_memory, required_resources, workers_that_fit
from apprentice.train.memory.estimate import PROCESS_BYTES


def recipe(**training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "model": {"base": "b"},
            "data": {"tasks": ["t"]},
            "tuning": {"method": "full"},
            "training": {"workers": 2, "steps": 5, "global_batch": 8} | training,
        }
    )


def test_memory_of_full_tuning() -> None:
    billion = 10**9
    assert required_resources(recipe(deepspeed={"stage": 0}), billion).memory == 16 * billion
    assert required_resources(recipe(deepspeed={"stage": 1}), billion).memory == 12 * billion
    assert required_resources(recipe(deepspeed={"stage": 2}), billion).memory == 10 * billion
    assert required_resources(recipe(deepspeed={"stage": 3}), billion).memory == 8 * billion
    assert required_resources(recipe(deepspeed={"stage": 0}), billion, torch.bfloat16).memory == 12 * billion
    assert required_resources(recipe(deepspeed={"stage": 2}), billion, torch.float16).memory == 10 * billion
    lean = recipe(deepspeed={"stage": 0}, optimizer={"name": "adafactor"})
    assert required_resources(lean, billion, torch.bfloat16).memory == 8 * billion


def test_enough() -> None:
    ask = required_resources(recipe(), 1000)
    check_resources(ask, [{"CPU": 4.0, "memory": 1.0 * GIB}])
    check_resources(ask, [{"CPU": 2.0}, {"CPU": 2.0}])


def test_too_few_cpus() -> None:
    ask = required_resources(recipe())
    with pytest.raises(
        ResourcesError, match="asks for 2 workers of 1 CPUs each, and 2 more CPUs for the data; the cluster has 3 CPUs"
    ):
        check_resources(ask, [{"CPU": 3.0}])


def test_a_worker_must_fit_one_node() -> None:
    ask = required_resources(recipe(resources={"cpus": 4}))
    with pytest.raises(ResourcesError, match="12 CPUs and 0 GPUs on 4 nodes"):
        check_resources(ask, [{"CPU": 3.0}] * 4)
    check_resources(ask, [{"CPU": 5.0}] * 2)


def test_those_who_write_replies_are_asked_for_too() -> None:
    rounds = recipe(
        objective="grpo", grpo={"reward": "run:r", "actors": 2}, resources={"cpus": 4, "gpus": 1}, checkpoint={"every_steps": 1}
    )
    ask = required_resources(rounds)
    assert (ask.data_cpus, ask.data_gpus) == (9.0, 2.0)
    check_resources(ask, [{"CPU": 20.0, "GPU": 4.0}])
    with pytest.raises(
        ResourcesError, match="4 CPUs and 1 GPUs each, and 9 more CPUs and 2 GPUs for the data; the cluster has 20 CPUs"
    ):
        check_resources(ask, [{"CPU": 20.0, "GPU": 3.0}])
    assert workers_that_fit(rounds, [{"CPU": 40.0, "GPU": 4.0}]) == 2


def test_no_gpu() -> None:
    with pytest.raises(ResourcesError, match="and 1 GPUs each"):
        check_resources(required_resources(recipe(resources={"gpus": 1})), [{"CPU": 64.0}])


def test_too_little_memory() -> None:
    ask = required_resources(recipe(), 10**9)
    with pytest.raises(ResourcesError, match=r"at least 9.3 GiB of memory in each of 2 workers; the cluster has 8.0 GiB"):
        check_resources(ask, [{"CPU": 8.0, "memory": 8.0 * GIB}])


def test_an_export_lands_where_its_memory_is_and_is_never_refused() -> None:
    nodes = [{"CPU": 8.0, "memory": 8.0 * GIB}, {"CPU": 8.0, "memory": 64.0 * GIB}]
    assert export_memory(10**9, torch.bfloat16, nodes) == 6 * 10**9 + PROCESS_BYTES
    assert export_memory(8 * 10**9, torch.float32, nodes) == 8 * 8 * 10**9 + PROCESS_BYTES
    assert export_memory(70 * 10**9, torch.bfloat16, nodes) == 64 * GIB
    assert export_memory(10**9, torch.bfloat16, [{"CPU": 8.0}]) is None
    assert export_memory(8 * 10**9, torch.bfloat16, nodes, largest=10**9) == 12 * 10**9 + PROCESS_BYTES
    assert export_memory(10**6, torch.bfloat16, nodes, largest=10**6) == 6 * 10**6 + PROCESS_BYTES  # no more than the whole
    head = {"memory": 500.0 * GIB}  # no CPU: the export would wait there for ever
    assert export_memory(70 * 10**9, torch.bfloat16, [head, *nodes]) == 64 * GIB


def test_a_range_of_workers_takes_the_most_that_fit_and_divide() -> None:
    ranged = recipe(workers={"min": 1, "max": 4})
    assert workers_that_fit(ranged, [{"CPU": 16.0}]) == 4
    assert workers_that_fit(ranged, [{"CPU": 5.0}]) == 2  # three would fit, and not divide four
    assert workers_that_fit(ranged, [{"CPU": 3.0}]) == 1
    with pytest.raises(ResourcesError):
        workers_that_fit(ranged, [{"CPU": 2.0}])


def test_an_autoscaler_is_asked_for_workers_writers_and_the_data() -> None:
    request = required_resources(recipe(resources={"cpus": 8, "gpus": 1}))
    assert request.bundles() == [{"CPU": 8.0, "GPU": 1.0}] * 2 + [{"CPU": 1.0}] * 2
    assert required_resources(recipe()).bundles() == [{"CPU": 1.0}] * 4
    writing = replace(request, data_cpus=3 * 8 + 1, data_gpus=3, writers=3)
    assert writing.bundles() == [{"CPU": 8.0, "GPU": 1.0}] * 5 + [{"CPU": 1.0}]
    total = {name: sum(bundle.get(name, 0) for bundle in writing.bundles()) for name in ("CPU", "GPU")}
    check_resources(writing, [total] * 1)


def test_workers_that_share_rows_come_in_whole_groups() -> None:
    ranged = recipe(workers={"min": 1, "max": 8}, sequence_parallel=2, global_batch=8)
    assert ranged.worker_numbers == [2, 4, 8]
    assert required_resources(ranged).workers == 2
    assert [workers_that_fit(ranged, [{"CPU": cpus}]) for cpus in (4.0, 5.0, 6.0, 9.0, 10.0)] == [2, 2, 4, 4, 8]
    with pytest.raises(ResourcesError, match="training asks for 2 workers of 1 CPUs each"):
        workers_that_fit(ranged, [{"CPU": 3.0}])


def test_each_lane_needs_a_cpu_and_the_least_workers_must_fit_the_lanes() -> None:
    made = recipe(workers={"min": 2, "max": 8})
    of_four = made.model_copy(update={"data": made.data.model_copy(update={"lanes": 4})})
    assert (required_resources(made).data_cpus, required_resources(of_four).data_cpus) == (2.0, 5.0)
    of_elastic = made.model_copy(update={"training": made.training.model_copy(update={"workers": WorkerRange(min=3, max=8)})})
    assert required_resources(of_elastic).workers == 4  # 3 do not divide 8
    assert [workers_that_fit(of_four, [{"CPU": float(cpus)}]) for cpus in (7, 9, 12, 13)] == [2, 4, 4, 8]
    with pytest.raises(ResourcesError, match="2 workers of 1 CPUs each, and 5 more CPUs for the data; the cluster has 6 CPUs"):
        workers_that_fit(of_four, [{"CPU": 6.0}])
