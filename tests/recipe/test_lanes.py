"""Lanes: on any number of workers each step has the same rows; numbers that do not divide each other are refused."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

import pytest
from pydantic import ValidationError

from apprentice.recipe import Recipe, lanes
from apprentice.recipe.lanes import Lanes
from apprentice.run.identity import identity

NUMBERS = (1, 2, 4, 8)


def dealt(count: int, readers: int, block: int) -> list[list[int]]:
    """Rows 0 to `count` of a lane as Ray Train deals them out: blocks in turn (tests/data/test_stream.py)."""
    blocks = [list(range(start, start + block)) for start in range(0, count, block)]
    return [[row for part in blocks[reader::readers] for row in part] for reader in range(readers)]


@pytest.mark.parametrize("most", NUMBERS)
@pytest.mark.parametrize("count", NUMBERS)
def test_every_step_has_the_same_rows_on_any_number_of_workers(count: int, most: int) -> None:
    made = Lanes(count, 16, most)
    for workers in [number for number in NUMBERS if number <= most]:
        assert made.fit(workers)
        streams: list[Any] = [[] for _ in range(workers)]
        for lane in range(count):
            readers = made.readers(lane, workers)
            assert [lane in made.of_worker(rank, workers) for rank in range(workers)] == [
                rank in readers for rank in range(workers)
            ]
            for rank, rows in zip(readers, dealt(5 * made.rows, len(readers), made.block_rows), strict=True):
                streams[rank].append((iter([(lane, row) for row in rows]), made.rows // len(readers)))
        for step in range(5):
            parts = [[row for stream, size in worker for row in islice(stream, size)] for worker in streams]
            assert {len(part) for part in parts} == {16 // workers}
            expected = [(lane, step * made.rows + row) for lane in range(count) for row in range(made.rows)]
            assert sorted(row for part in parts for row in part) == expected


def test_the_example_is_true() -> None:
    table = re.findall(r"^ +read, of (\d) workers +((?:\w  ){7}\w)", lanes.__doc__ or "", re.MULTILINE)
    assert len(table) == 2
    made = Lanes(4, 8, 8)
    for workers, names in table:
        ranks = ["ABCDEFGH".index(name) for name in names.split()]
        assert [lane for lane in range(4) if ranks[lane] == 0] == list(made.of_worker(0, int(workers)))
        assert sorted(set(ranks[0::4])) == list(made.readers(0, int(workers)))


def recipe(lanes: int | None = None, **training: Any) -> Recipe:
    content = {"name": "r", "model": {"base": "b"}, "data": {"tasks": ["sst2"]} | ({} if lanes is None else {"lanes": lanes})}
    return Recipe.model_validate(content | {"training": {"workers": 2, "steps": 5, "global_batch": 12} | training})


@pytest.mark.parametrize(
    ("count", "training", "sentence"),
    [
        (
            5,
            {},
            "global_batch 12 cannot be divided among 5 lanes, of which each step takes equally many rows; choose a multiple of 5",
        ),
        (3, {}, "2 workers cannot read 3 lanes evenly: one number must divide the other; choose data.lanes or training.workers so"),
        (4, {"workers": {"min": 1, "max": 6}}, "6 workers cannot read 4 lanes evenly"),
        (
            2,
            {"objective": "grpo", "grpo": {"reward": "run:r"}, "checkpoint": {"every_steps": 1}},
            "data.lanes 2 would split up rounds, which objective grpo makes one after another; leave it out",
        ),
    ],
)
def test_lanes_that_do_not_fit_are_refused(count: int, training: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(sentence)):
        recipe(count, **training)


def test_training_runs_only_with_numbers_that_fit() -> None:
    """3 of 6 workers cannot share two lanes; a least number that does not divide the greatest is no number either."""
    assert recipe(workers={"min": 1, "max": 6}).worker_numbers == [1, 2, 3, 6]
    assert recipe(2, workers={"min": 1, "max": 6}).worker_numbers == [1, 2, 6]
    assert recipe(2, workers={"min": 3, "max": 6}).worker_numbers == [6]
    assert recipe(4, workers={"min": 3, "max": 12}).worker_numbers == [4, 12]


def test_a_single_lane_leaves_the_identity_as_it_was() -> None:
    before = identity(recipe())
    assert "data.lanes" not in before
    assert identity(recipe(1)) == before
    assert identity(recipe(2)) == before | {"data.lanes": 2}
