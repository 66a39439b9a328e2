"""How many scoring workers fit."""

from __future__ import annotations

import pytest

from apprentice.errors import ResourcesError
from apprentice.model_pool.pool import FreeResources, WorkerPool, size_pool

GIB = 2**30


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
    assert size_pool(resources, weights, batches) == expected
    assert expected.workers * expected.cpus <= resources.cpus
    assert expected.cpus <= resources.cpus_together


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
