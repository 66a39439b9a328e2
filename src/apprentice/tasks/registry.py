"""Registry of tasks: finds the library's by name and a user's own by path or glob, and loads their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from apprentice.errors import TaskError, did_you_mean, requirement_of
from apprentice.plain_yaml import load_yaml
from apprentice.tasks.importers.conversations import conversation_tasks
from apprentice.tasks.importers.natural_instructions import instruction_tasks
from apprentice.tasks.importers.preferences import preference_tasks
from apprentice.tasks.importers.prompt_only import prompt_only_tasks
from apprentice.tasks.importers.promptsource import promptsource_tasks
from apprentice.tasks.importers.records import KINDS, record_tasks
from apprentice.tasks.importers.unpaired import unpaired_tasks
from apprentice.tasks.schema import Task, Template
from apprentice.tasks.source_spec import SourceSpec

Entry = str | Mapping[str, Any]  # an entry of `data.tasks`
Find = Callable[[Entry, Path], list[Task]]  # looks up an entry; paths are relative to the folder
LIBRARY = Path(__file__).parent / "library"
BUILTIN = LIBRARY / "quickstart"
# Key of an entry that names files of another format → the importer of that format.
IMPORTERS: dict[str, Callable[[Mapping[str, Any]], list[Task]]] = {
    "promptsource": promptsource_tasks,
    "natural_instructions": instruction_tasks,
    "conversations": conversation_tasks,
    "preferences": preference_tasks,
    "unpaired": unpaired_tasks,
    "prompts": prompt_only_tasks,
    **dict.fromkeys(KINDS, record_tasks),
}


@cache
def library() -> dict[str, Path]:
    """Task name → its file, for every task that the package ships."""
    return {path.stem: path for path in sorted(LIBRARY.glob("*/*.yaml"))}


@cache
def load_task(path: Path) -> Task:
    """The task in one YAML file; paths of its data files, relative to it, become absolute.

    Raises `TaskError` that names the file, the place in it and the remedy.
    """
    try:
        content: Any = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TaskError(f"{path} does not exist; check the path in data.tasks.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TaskError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    try:
        task = Task.model_validate(content)
    except ValidationError as error:
        raise TaskError(f"{path}: {_first_fault(error)}") from error
    task = task.model_copy(update={"origin": str(path)})
    if path.is_relative_to(LIBRARY):
        return task
    files = [spec.files and {split: str(path.parent / file) for split, file in spec.files.items()} for spec in task.sources]
    sources = [spec.model_copy(update={"files": where}) for spec, where in zip(task.sources, files, strict=True)]
    return task.model_copy(update={"sources": tuple(sources)})


def _first_fault(error: ValidationError) -> str:
    """One sentence on the place and the fault; an unknown key comes first, since a missing key is often the same one misspelt."""
    faults = error.errors()
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        rooms: dict[str, type[BaseModel]] = {"sources": SourceSpec, "templates": Template}
        model = rooms.get(str(fault["loc"][0]), Task) if len(fault["loc"]) > 1 else Task
        near = did_you_mean(str(fault["loc"][-1]), model.model_fields)
        return f"{place}: a {model.__name__.removesuffix('Spec').lower()} has no such key.{near or ' Remove it.'}"
    return f"{place + ': ' if place else ''}{requirement_of(fault['type'], fault['msg'])}."


def find_tasks(entry: Entry, folder: Path) -> list[Task]:
    """The tasks that one entry of `data.tasks` stands for.

    The entry is a name in the library, a cluster, a path or glob relative to `folder`, or a mapping that names files of
    another format, such as `{promptsource: …}`. Raises `TaskError` if there are none.
    """
    if isinstance(entry, Mapping):
        kind = next(kind for kind in IMPORTERS if entry.get(kind) is not None)
        return IMPORTERS[kind](entry)
    name = entry
    if name.endswith((".yaml", ".yml")):
        paths = sorted(folder.glob(name)) if not Path(name).is_absolute() else [Path(name)]
        if not paths:
            raise TaskError(f"data.tasks: no file matches {name!r} in {folder}; check the path.")
        return [load_task(path.resolve()) for path in paths]
    if name in library():
        return [load_task(library()[name])]
    members = [path for path in library().values() if path.parent.name == name]
    if members:
        return [load_task(path) for path in members]
    known = [*library(), *{path.parent.name for path in library().values()}]
    raise TaskError(f"data.tasks: {name!r} is not a task.{did_you_mean(name, known)} `apprentice tasks` lists them.")


def select_tasks(
    entries: Sequence[Entry], hold_out: Sequence[str], folder: Path, *, to_train: bool = True, find: Find = find_tasks
) -> tuple[tuple[Task, ...], frozenset[str]]:
    """The tasks of all `entries`, in order and each once, and the names of those that are kept out of training.

    Kept out are the tasks and clusters in `hold_out`, and tasks without training rows. `find` looks up an entry;
    `TaskSnapshot.find` of a run gives the tasks as they were when the run was made. Raises `TaskError` for an unknown name, for a
    name in `hold_out` that no task or cluster has, and, with `to_train`, if nothing is left to train on.
    """
    by_name = {task.name: task for entry in entries for task in find(entry, folder)}
    tasks = tuple(by_name.values())
    known = {*by_name, *(task.cluster for task in tasks)}
    for name in hold_out:
        if name not in known:
            raise TaskError(f"data.hold_out: {name!r} is neither a task nor a cluster of this recipe.{did_you_mean(name, known)}")
    held_out = frozenset(
        task.name for task in tasks if task.name in hold_out or task.cluster in hold_out or not _has_training_rows(task)
    )
    if to_train and len(held_out) == len(tasks):
        raise TaskError("data.hold_out keeps out every task, so nothing is left to train on; shorten it.")
    return tasks, held_out


def _has_training_rows(task: Task) -> bool:
    return any("train" in spec.splits and (spec.files is None or spec.splits["train"] in spec.files) for spec in task.sources)
