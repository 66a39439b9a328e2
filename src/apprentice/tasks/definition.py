"""What a task is: the hash of everything that shapes its examples, wherever its file and its rows lie."""

from __future__ import annotations

import hashlib

from apprentice.tasks.schema import Task


def definition_of(task: Task) -> str:
    """A hash of everything that shapes the task's examples; a key that a later version brings counts once it is used."""
    content = task.model_dump_json(exclude={"sources", "summary", "licence", "metrics", "sample", "origin"}, exclude_defaults=True)
    return hashlib.sha256(content.encode()).hexdigest()
