"""How many scoring workers fit."""

from __future__ import annotations

import pytest

from apprentice.errors import ResourcesError
from apprentice.model_pool.pool import Pool, Room, pool_for

GIB = 2**30


@pytest.mark.parametrize(
    ("room", "weights", "batches", "expected"),
    [
        (Room(2, 2, 0, 20 * GIB), GIB // 2, 10, Pool(2, 1, 0)),
        (Room(1, 1, 0, 20 * GIB), GIB // 2, 10, Pool(1, 1, 0)),
        (Room(4, 4, 0, 20 * GIB), GIB // 2, 1, Pool(1, 4, 0)),  # one batch, one worker, all threads
        (Room(2, 2, 0, 2 * GIB), GIB // 2, 10, Pool(1, 2, 0)),  # memory for one
        (Room(32, 32, 0, 400 * GIB), GIB, 1000, Pool(8, 4, 0)),
        (Room(8, 2, 0, 400 * GIB), GIB, 1000, Pool(4, 2, 0)),  # four nodes of two CPUs
        (Room(8, 1, 0, 400 * GIB), GIB, 1000, Pool(8, 1, 0)),  # busy cluster: one CPU here, one there
        (Room(16, 16, 2, 100 * GIB), 15 * GIB, 1000, Pool(2, 1, 1)),
    ],
)
def test_pool_fills_the_room(room: Room, weights: int, batches: int, expected: Pool) -> None:
    assert pool_for(room, weights, batches) == expected
    assert expected.workers * expected.cpus <= room.cpus
    assert expected.cpus <= room.cpus_together


@pytest.mark.parametrize(
    ("room", "words"),
    [
        (Room(0, 1, 0, 20 * GIB), "1 free CPU"),
        (Room(4, 4, 0, 2 * GIB), "3.0 GiB for one copy of the model and the cluster has 2.0 GiB"),
    ],
)
def test_too_little_is_said(room: Room, words: str) -> None:
    with pytest.raises(ResourcesError, match=words):
        pool_for(room, 2 * GIB, 10)
