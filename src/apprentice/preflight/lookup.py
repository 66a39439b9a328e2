"""Lookup of what several checks need to know of one recipe, each found once: its tasks, its model folder and its tokenizer."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from apprentice.pretrained.hub import local_folder
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder
from apprentice.tasks.registry import select_tasks
from apprentice.tasks.schema import Task


class RecipeLookup:
    """A recipe with what it names. A lookup that fails raises its error, and is tried again by the next check."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    def run(self) -> Run:
        """The run that the recipe names, made already or not."""
        return Run(Folder.at(self.recipe.storage) / self.recipe.name)

    @cached_property
    def selection(self) -> tuple[tuple[Task, ...], frozenset[str]]:
        """(tasks, names of those held out). Raises `TaskError`."""
        return select_tasks(self.recipe.data.entries, self.recipe.data.hold_out, Path.cwd())

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks, held-out ones too. Raises `TaskError`."""
        return self.selection[0]

    @cached_property
    def model_folder(self) -> Path:
        """The base model on this machine, downloaded if need be. Raises `ModelError`."""
        return local_folder(self.recipe.model.base, trust=self.recipe.model.trust)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The base model's tokenizer. Raises `ModelError`."""
        return Tokenizer(self.model_folder)
