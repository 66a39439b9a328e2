"""`apprentice.Recipe`: a recipe with the stages up to training as methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from apprentice.console import ignore_progress
from apprentice.pipeline import Progress
from apprentice.python_api.check_result import CheckResult, PackedRowsPage, PreviewList
from apprentice.python_api.evaluation_report import EvaluationReport
from apprentice.python_api.html_display import html_heading, html_paragraph
from apprentice.python_api.interactive_run import InteractiveRun
from apprentice.python_api.training_process import TrainingProcess
from apprentice.recipe import Recipe, dump_recipe, find_recipe, load_recipe, make_recipe
from apprentice.storage import Folder


class InteractiveRecipe(Recipe):
    """A recipe: `Recipe.load(file, "key.path=value", …)`, or `Recipe(name=…, model={…}, data={…}, training={…})`.

    The keys are those of a recipe file; paths are relative to the file, or to the current directory. Raises `RecipeError` with the
    key, the reason and the nearest known key. A recipe does not change: `override` gives another one.
    """

    def __init__(self, **values: Any) -> None:
        super().__init__(**_set_fields(make_recipe(values)))

    @classmethod
    def load(cls, file: str | Path, *overrides: str) -> Self:
        """The recipe in a file, or the shipped one of this name, with overrides `key.path=value`."""
        return cls._of(load_recipe(find_recipe(str(file)), overrides))

    def override(self, *overrides: str) -> Self:
        """This recipe with overrides `key.path=value`."""
        return type(self)._of(make_recipe(self.model_dump(mode="json", exclude_unset=True), overrides))

    @classmethod
    def _of(cls, recipe: Recipe) -> Self:
        return cls(**_set_fields(recipe))

    @property
    def run(self) -> InteractiveRun:
        """Its run, `<storage>/<name>`, whether it is there yet or not."""
        return InteractiveRun(Folder.at(self.storage) / self.name)

    def check(self, *, fast: bool = False) -> CheckResult:
        """All that can be known before hardware is reserved, as `apprentice check` says it.

        `fast` leaves out what needs Ray or a pass of the model. What is wrong with the recipe is a finding, and not raised.
        """
        from apprentice.pipeline import check_recipe

        return CheckResult(tuple(check_recipe(self, fast=fast)))

    def preview(self, number: int = 5) -> PreviewList:
        """The first `number` examples of the sampling plan, as the model will see them. Raises `DataError` and `TaskError`."""
        from apprentice.pipeline import preview_examples

        return PreviewList(tuple(preview_examples(self, number)))

    def preview_rows(self, number: int = 3) -> PackedRowsPage:
        """The first `number` packed rows as a page in colours. Raises `DataError` and `TaskError`."""
        from apprentice.pipeline import preview_html

        return PackedRowsPage(preview_html(self, number))

    def packed_rows(self, window: int = 0) -> dict[str, Any]:
        """The arrays of one window of packed rows, as training gets them.

        `input_ids`, `segment_ids` (0 is padding), `positions` and `loss_mask` are NumPy arrays of shape (rows, length); `examples`
        has the plan's positions of each row's examples. Raises `DataError` and `TaskError`.
        """
        from apprentice.pipeline import packed_window

        return dict(packed_window(self, window))

    def prepare(self, *, restart: bool = False, progress: Progress | None = None) -> InteractiveRun:
        """Makes the run folder with the frozen index of each task. Raises `RunError` where the folder is another recipe's."""
        from apprentice.pipeline import prepare_run

        prepare_run(self, restart=restart, progress=progress or ignore_progress)
        return self.run

    def train(self, *, restart: bool = False, progress: Progress | None = None) -> TrainingProcess:
        """Starts the training, or goes on with one that stopped, in a process of its own, and returns its handle at once.

        `restart` removes what is there. `progress` is called with the name of a stage and its values; `apprentice.print_progress`
        prints them. What is wrong is raised by the handle's `wait`.
        """
        return TrainingProcess(self, restart=restart, progress=progress)

    def evaluate(self, *, restart: bool = False, progress: Progress | None = None) -> EvaluationReport:
        """Scores its run beside the base model, as `apprentice evaluate RECIPE` does.

        Raises `RunError` for a run without a trained model, or one whose tasks are defined otherwise now.
        """
        from apprentice.pipeline import EvaluationOptions, check_definitions, evaluate_run

        check_definitions(self)
        options = EvaluationOptions(restart=restart, storage=self.storage)
        return EvaluationReport.from_json(*evaluate_run(self, options=options, progress=progress or ignore_progress))

    def __repr_name__(self) -> str:
        return "Recipe"

    def _repr_html_(self) -> str:
        return html_heading(f"recipe {self.name}") + html_paragraph(dump_recipe(self))


def _set_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe that do not have their defaults."""
    return {name: getattr(recipe, name) for name in recipe.model_fields_set}
