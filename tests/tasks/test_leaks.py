"""What is held out must not be learnt from another task's rows."""

from __future__ import annotations

from typing import Any

from apprentice.tasks.leaks import leaks
from apprentice.tasks.schema import Task


def task(name: str, *sources: dict[str, Any]) -> Task:
    content = {"name": name, "cluster": "c", "sources": list(sources), "answer": "{{ a }}", "metrics": ["exact_match"]}
    return Task.model_validate(content | {"templates": [{"name": "t", "instruction": "Do."}]})


def test_the_same_place_leaks() -> None:
    tasks = [
        task("mood", {"dataset": "reviews"}, {"hub": "site/reviews", "config": "en"}),
        task("stars", {"files": {"train": "stars.csv"}}, {"hub": "site/reviews", "config": "en"}),
        task("french", {"hub": "site/reviews", "config": "fr"}),
        task("again", {"dataset": "reviews"}),
        task("csv", {"files": {"train": "stars.csv", "test": "other.csv"}}),
    ]
    assert leaks(tasks, {"mood"}) == [
        ("mood", "again", "dataset reviews"),
        ("mood", "stars", "hub dataset site/reviews, configuration en"),
    ]
    assert leaks(tasks, {"mood", "again", "stars"}) == [("stars", "csv", "file stars.csv")]
    assert leaks(tasks, {"french"}) == leaks(tasks, set()) == []
