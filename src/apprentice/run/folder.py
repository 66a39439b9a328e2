"""The run folder `<storage>/<name>/`: paths of its files, and opening and finding runs.

    recipe.yaml  tasks.jsonl  identity.json    the recipe and tasks as resolved, and the run's identity (`identity`)
    index/       reference/   rounds/          usable rows; DPO's reference values; on-policy rounds
    checkpoints/ model/       adapter/         training state; exported weights
    report/      events/      ledger.json      evaluation; TensorBoard; requested and realised shares
    status.json  fence/                        state shown by `apprentice runs`; who may write (`fence`)

The whole tree is in docs/guides/run_folder.md.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apprentice.errors import RunError
from apprentice.plain_yaml import load_yaml
from apprentice.recipe import Recipe, dump_recipe
from apprentice.run.fence import FENCE
from apprentice.run.identity import CONTRACT_FILE, FORMAT, differences, identity, identity_hash
from apprentice.storage import Folder, is_uri
from apprentice.tasks.registry import find_tasks
from apprentice.tasks.snapshot import TaskSnapshot, dump_tasks


@dataclass(frozen=True)
class Run:
    """One run, given by its folder; the properties are the files and folders in it."""

    folder: Folder

    @property
    def name(self) -> str:
        """The run's name, which is its folder's."""
        return self.folder.name

    @property
    def format(self) -> int:
        """The format of the run folder, which decides how rows are read and prompts encoded; `FORMAT` for a run not yet made."""
        file = self.folder / "identity.json"
        return int(file.read_json().get("format", 1)) if file.exists() else FORMAT

    @property
    def recipe_file(self) -> Folder:
        """The recipe as resolved, in YAML."""
        return self.folder / "recipe.yaml"

    @property
    def tasks_file(self) -> Folder:
        """The definitions of the run's tasks, a JSON object a line."""
        return self.folder / "tasks.jsonl"

    @property
    def index(self) -> Folder:
        """The folder of the frozen index: the usable rows of each task."""
        return self.folder / "index"

    @property
    def reference(self) -> Folder:
        """The folder of the reference model's log-probabilities, for DPO."""
        return self.folder / "reference"

    @property
    def rounds(self) -> Folder:
        """The folder of the rounds of an on-policy run."""
        return self.folder / "rounds"

    @property
    def checkpoints(self) -> Folder:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def model(self) -> Folder:
        """The folder of the exported model, with its prompt contract."""
        return self.folder / "model"

    @property
    def adapter(self) -> Folder:
        """The folder of the exported adapter, where the tuning method trains one."""
        return self.folder / "adapter"

    @property
    def report(self) -> Folder:
        """The folder of the run's own evaluation."""
        return self.folder / "report"

    @property
    def events(self) -> Folder:
        """The folder of TensorBoard's files."""
        return self.folder / "events"

    @property
    def ledger_file(self) -> Folder:
        """Requested and realised share of each task."""
        return self.folder / "ledger.json"

    @property
    def export_file(self) -> Folder:
        """How far the exported model is from the trained one; not there in runs of earlier versions."""
        return self.folder / "export.json"

    @property
    def is_trained(self) -> bool:
        """True once the exported model is complete; its prompt contract is written last."""
        return (self.model / CONTRACT_FILE).exists()

    def recipe(self) -> Recipe:
        """The resolved recipe that the run was started with."""
        return Recipe.model_validate(load_yaml(self.recipe_file.read_text()))

    def tasks(self) -> TaskSnapshot:
        """The task definitions stored when the run was last opened; empty for runs of earlier versions, which stored none."""
        return TaskSnapshot(self.tasks_file.read_text() if self.tasks_file.exists() else "")

    def status(self) -> dict[str, Any]:
        """The content of status.json (state, step, steps, loss, …), which `apprentice runs` shows; empty before training starts."""
        file = self.folder / "status.json"
        return dict(file.read_json()) if file.exists() else {}

    def clear(self) -> None:
        """Removes everything except the fence, which the caller holds."""
        for child in self.folder.children():
            if child.name != FENCE:
                child.delete()

    def update_status(self, **values: Any) -> None:
        """Sets keys of status.json and the time of the update; other keys stay."""
        (self.folder / "status.json").write_json(
            self.status() | values | {"updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        )


def open_run(recipe: Recipe, *, restart: bool = False) -> Run:
    """The run that `recipe` names: a new folder, or the existing one if its identity is the same.

    Writes tasks, recipe and identity. Raises `RunError` with the keys that differ if the folder belongs to another identity;
    `restart` removes the old run first.
    """
    run = Run(Folder.at(recipe.storage) / recipe.name)
    version = FORMAT if restart else run.format
    find = find_tasks if restart else run.tasks().find_again
    keys = identity(recipe, version, find=find)
    file = run.folder / "identity.json"
    if restart:
        run.clear()
    elif file.exists() and (changed := differences(recipe, file.read_json()["keys"], keys)):
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise RunError(
            f"run {recipe.name!r} in {recipe.storage} was made with another recipe: {', '.join(changed[:5])}{more}."
            " Choose another `name`, or start over with --restart."
        )
    tasks = dump_tasks(recipe.data.entries, Path.cwd(), find)
    run.folder.make()
    run.tasks_file.write_text(tasks)
    run.recipe_file.write_text(dump_recipe(recipe))
    file.write_json({"format": version, "hash": identity_hash(keys), "keys": keys})
    return run


def find_run(text: str, storage: str = "./runs") -> Run | None:
    """The run that `text` names: the path or URI of a run folder, or a name in `storage`; None if there is none."""
    for folder in (Folder.at(text), Folder.at(storage) / text if not is_uri(text) else None):
        if folder is not None and (folder / "identity.json").exists():
            return Run(folder)
    return None
