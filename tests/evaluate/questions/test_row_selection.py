"""Which rows meet which wordings."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from apprentice.evaluate.questions.row_selection import QuestionRequest, select_requests
from apprentice.tasks.schema import Task


def task(name: str = "moods", wordings: int = 5) -> Task:
    templates = [{"name": f"w{number}", "instruction": f"Say it, version {number}."} for number in range(wordings)]
    templates.append({"name": "backwards", "instruction": "Write a text.", "inverted": True})
    return Task.model_validate(
        {
            "name": name,
            "cluster": "moods",
            "sources": [{"dataset": name}],
            "answer": "{{ text }}",
            "metrics": ["exact_match"],
            "templates": templates,
        }
    )


TEST = np.arange(100, 300, 2)


def select(of: Task, *, most: int = 40, per_row: int = 2, seed: int = 1, shots: tuple[int, ...] = (0,)) -> list[QuestionRequest]:
    return select_requests(of, TEST, shots, max_examples=most, templates_per_row=per_row, seed=seed)


@pytest.mark.parametrize(("wordings", "per_row", "most"), [(5, 2, 40), (5, 2, 7), (3, 2, 3), (8, 3, 100), (1, 1, 10), (2, 5, 9)])
def test_wordings_are_balanced_and_never_twice_for_a_row(wordings: int, per_row: int, most: int) -> None:
    selected = select(task(wordings=wordings), most=most, per_row=per_row)
    each = min(per_row, wordings)
    assert len(selected) == most * each
    assert set(Counter(request.row for request in selected).values()) == {each}
    assert len({(request.row, request.template) for request in selected}) == len(selected)
    counts = Counter(request.template for request in selected)
    assert len(counts) == min(wordings, most * each)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert "backwards" not in counts


def test_rows_come_from_the_index_and_a_longer_sample_keeps_the_shorter_one() -> None:
    short, long = select(task(), most=10), select(task(), most=30)
    assert {request.row for request in long} <= set(TEST.tolist())
    assert long[: len(short)] == short
    assert [request.row for request in select(task(), most=1000, per_row=1)] != TEST.tolist()
    assert sorted(request.row for request in select(task(), most=1000, per_row=1)) == TEST.tolist()


def test_seed_and_name_decide_and_nothing_else() -> None:
    assert select(task()) == select(task())
    assert select(task()) != select(task(), seed=2)
    assert [request.row for request in select(task())] != [request.row for request in select(task("other"))]


def test_each_number_of_exemplars_asks_the_same_rows_and_wordings() -> None:
    both = select(task(), shots=(0, 5))
    zero, five = ([request[:3] for request in both if request.shots == k] for k in (0, 5))
    assert zero == five == [request[:3] for request in select(task())]
