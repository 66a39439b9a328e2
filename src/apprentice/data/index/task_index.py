"""The index of one task, and its file `<index>/<task>.npz`. An index folder is complete once `INDEX_FILE` exists in it."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from apprentice.data.sampling.permutation import Numbers
from apprentice.data.sources.locate import Source
from apprentice.errors import DataError
from apprentice.storage import Folder
from apprentice.tasks.definition import definition_of
from apprentice.tasks.schema import Task

INDEX_FILE = "index.json"  # written last; a folder without it is of an older version, or was interrupted


@dataclass(frozen=True, eq=False)
class TaskIndex:
    """The usable rows of one task, as ascending source row numbers (int64)."""

    task: str
    train_source: Source | None
    test_source: Source | None
    train: Numbers  # rows of train_source; held-out tasks have them too, for exemplars only
    validation: Numbers  # rows of train_source that are never trained on; empty for held-out tasks
    test: Numbers  # rows of test_source
    mean_tokens: float  # of a zero-shot training example, prompt, answer and end; 0 without training rows
    mean_target_tokens: float  # of its answer and end
    rejects: dict[str, int]  # reason → rows, both splits together
    filtered: dict[str, int] = field(default_factory=dict)  # reason → training rows that `data.filters` left out


def indexed_tasks(folder: Folder) -> set[str]:
    """Names of the tasks with an index file in `folder`."""
    return {file.name.removesuffix(".npz") for file in folder.children() if file.name.endswith(".npz")}


def read_index(folder: Folder, task: Task) -> tuple[TaskIndex, str]:
    """The index of `task` in `folder`, and the hash of the task's definition when it was made. Raises `DataError` without one."""
    if not index_file(folder, task).exists():
        raise DataError(f"{index_file(folder, task)} does not exist: the run has no index of task {task.name!r}; prepare it first.")
    return _unpacked(index_file(folder, task).read_bytes())


def index_file(folder: Folder, task: Task) -> Folder:
    """The file of a task's index in an index folder."""
    return folder / f"{task.name}.npz"


def index_bytes(index: TaskIndex, task: Task) -> bytes:
    """The content of an index file: row numbers as compressed NumPy arrays, everything else and the definition's hash as JSON."""
    rows = {name: getattr(index, name) for name in ("train", "validation", "test")}
    meta = {name: value for name, value in vars(index).items() if name not in rows}
    meta |= {name: asdict(meta[name]) if meta[name] else None for name in ("train_source", "test_source")}
    text = json.dumps({"definition": definition_of(task), **meta})
    stream = io.BytesIO()
    # Differences of neighbouring row numbers are nearly all 1, which compresses to almost nothing.
    steps = {name: np.diff(numbers, prepend=0) for name, numbers in rows.items()}
    np.savez_compressed(stream, meta=np.array(text), **steps)
    return stream.getvalue()


def _unpacked(data: bytes) -> tuple[TaskIndex, str]:
    """The index and the hash of the task's definition."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        meta: dict[str, Any] = json.loads(str(arrays["meta"]))
        meta |= {name: np.cumsum(arrays[name], dtype=np.int64) for name in ("train", "validation", "test")}
    definition = meta.pop("definition")
    for name in ("train_source", "test_source"):
        meta[name] = meta[name] and _source(meta[name])
    return TaskIndex(**meta), definition


def _source(content: dict[str, Any]) -> Source:
    lists = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}  # JSON knows no tuples
    return Source(**(content | lists))
