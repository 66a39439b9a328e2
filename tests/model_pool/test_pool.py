"""How many scoring workers fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from apprentice.errors import ResourcesError
from apprentice.model_pool.host_memory import GIB
from apprentice.model_pool.pool import FreeResources, WorkerPool, check_fits_gpus, size_pool


@pytest.mark.parametrize(
    ("resources", "weights", "batches", "expected"),
    [
        (FreeResources(2, 2, 0, 20 * GIB), GIB // 2, 10, WorkerPool(2, 1, 0)),
        (FreeResources(1, 1, 0, 20 * GIB), GIB // 2, 10, WorkerPool(1, 1, 0)),
        (FreeResources(4, 4, 0, 20 * GIB), GIB // 2, 1, WorkerPool(1, 4, 0)),  # one batch, one worker, all threads
        (FreeResources(2, 2, 0, 2 * GIB), GIB // 2, 10, WorkerPool(1, 2, 0)),  # memory for one
        (FreeResources(32, 32, 0, 400 * GIB), GIB, 1000, WorkerPool(8, 4, 0)),
        (FreeResources(8, 2, 0, 400 * GIB), GIB, 1000, WorkerPool(4, 2, 0)),  # four nodes of two CPUs
        (FreeResources(8, 1, 0, 400 * GIB), GIB, 1000, WorkerPool(8, 1, 0)),  # busy cluster: one CPU here, one there
        (FreeResources(16, 16, 2, 100 * GIB), 15 * GIB, 1000, WorkerPool(2, 1, 1)),
    ],
)
def test_pool_fills_the_resources(resources: FreeResources, weights: int, batches: int, expected: WorkerPool) -> None:
    pool = size_pool(resources, weights, batches)
    assert replace(pool, memory=0) == expected
    assert pool.memory == weights + GIB
    assert expected.workers * expected.cpus <= resources.cpus
    assert expected.cpus <= resources.cpus_together


@pytest.mark.parametrize(
    ("gpus", "split", "batches", "expected"),
    [
        (8, 1, 1000, WorkerPool(8, 1, 1, 3 * GIB, "vllm", 1)),
        (8, 4, 1000, WorkerPool(2, 1, 4, 6 * GIB, "vllm", 4)),
        (8, 8, 1000, WorkerPool(1, 1, 8, 10 * GIB, "vllm", 8)),
        (8, 2, 1, WorkerPool(1, 1, 2, 4 * GIB, "vllm", 2)),
    ],
)
def test_a_worker_has_the_gpus_that_its_model_is_split_over(gpus: int, split: int, batches: int, expected: WorkerPool) -> None:
    """vLLM reads weights into the GPUs' memory, so the host's is that of its processes."""
    resources = FreeResources(16, 16, gpus, 100 * GIB, gpus, 80 * GIB)
    assert size_pool(resources, 60 * GIB, batches, engine="vllm", tensor_parallel=split) == expected


def test_on_cpus_vllm_has_one_worker_with_all_of_a_nodes() -> None:
    resources = FreeResources(16, 8, 0, 100 * GIB)
    assert size_pool(resources, GIB, 50, engine="vllm", tensor_parallel=2) == WorkerPool(1, 8, 0, 5 * GIB, "vllm", 2)


@pytest.mark.parametrize(
    ("weights", "together", "memory", "split", "words"),
    [
        (131, 8, 80, 1, "131.0 GiB, all of it in each GPU, and a GPU here has 80.0 GiB; set `serving.tensor_parallel: 2`"),
        (131, 1, 80, 1, "a GPU here has 80.0 GiB; add a node with more or larger GPUs, or choose a smaller model"),
        (131, 8, 24, 2, "65.5 GiB of it to each GPU, and a GPU here has 24.0 GiB; set `serving.tensor_parallel: 8`"),
        (131, 4, 80, 8, "over 8 GPUs of one node, and the largest node has 4; lower it, or add a node with more GPUs"),
        (131, 8, 1, 1, "add a node with more or larger GPUs"),
    ],
)
def test_a_model_that_fits_no_gpu_is_said(weights: int, together: int, memory: int, split: int, words: str) -> None:
    with pytest.raises(ResourcesError, match=re.escape(words)):
        check_fits_gpus(weights * GIB, together, memory * GIB, split)
    check_fits_gpus(15 * GIB, 8, memory * GIB if memory > 24 else None, 1)


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        (FreeResources(0, 1, 0, 20 * GIB), "1 free CPU"),
        (FreeResources(4, 4, 0, 2 * GIB), "3.0 GiB for one copy of the model and the cluster has 2.0 GiB"),
    ],
)
def test_too_little_is_said(resources: FreeResources, words: str) -> None:
    with pytest.raises(ResourcesError, match=words):
        size_pool(resources, 2 * GIB, 10)
