"""The definition hash of a task, over everything that shapes its examples, but not the places of its file and rows."""

from __future__ import annotations

import hashlib

from apprentice.tasks.schema import Task


def definition_of(task: Task) -> str:
    """SHA-256, in hex, of everything that shapes the task's examples.

    Keys at their defaults are left out, so that a key which a later version adds changes the hash only of tasks that use it.
    """
    content = task.model_dump_json(exclude={"sources", "summary", "licence", "metrics", "sample", "origin"}, exclude_defaults=True)
    return hashlib.sha256(content.encode()).hexdigest()
