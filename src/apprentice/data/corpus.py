"""The corpus: everything that says what a run trains on, and how much of it a step takes.

Knows nothing of Ray's streams or of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from apprentice.artifacts import Run
from apprentice.data.contract import layout_of
from apprentice.data.index import TaskIndex, freeze
from apprentice.data.layout import Layout
from apprentice.data.plan import Plan
from apprentice.recipe import Recipe
from apprentice.storage import Folder
from apprentice.tasks.loading import select_tasks
from apprentice.tasks.schema import Task
from apprentice.tokenizer import Tokenizer

FILLED = 0.98  # of a row's tokens that best fit fills with short examples


@dataclass(frozen=True, eq=False)
class Corpus:
    """Everything that says what a run trains on. Picklable."""

    recipe: Recipe
    tasks: tuple[Task, ...]  # held-out ones too; packed rows name a task by its number here
    held_out: frozenset[str]
    indices: Mapping[str, TaskIndex]
    plan: Plan
    layout: Layout

    @property
    def row_length(self) -> int:
        """Tokens of a packed row, padding included."""
        data = self.recipe.data
        return data.packing.length if data.packing.strategy == "best_fit" else data.max_length


def make_corpus(recipe: Recipe, run: Run, *, parallel: bool = True) -> Corpus:
    """The corpus of `recipe`, its index frozen in `run` (or found there); `parallel` uses Ray, which must be up.

    Raises `TaskError`, `DataError` and `RecipeError` for what the recipe names and the sources do not give.
    """
    tasks, held_out = select_tasks(recipe.data.tasks, recipe.data.hold_out, Path.cwd())
    tokenizer = Tokenizer.load(recipe.model.base)
    cache = Folder.at(recipe.storage) / "cache"
    indices = freeze(tasks, recipe, run.index, cache, tokenizer, parallel=parallel)
    return Corpus(recipe, tasks, held_out, indices, Plan.of(recipe, tasks, indices), layout_of(recipe, tokenizer))


def estimate_steps(corpus: Corpus) -> dict[str, float]:
    """What the frozen mean lengths say of the run: the same wherever it is asked, and good to about a tenth.

    `steps` (exact where the recipe gives them), `tokens_per_step` (padding excluded), `target_tokens_per_step`,
    `rows_per_window`.
    """
    data, training = corpus.recipe.data, corpus.recipe.training
    tokens, targets = _mean_example(corpus)
    examples_per_row = max(1.0, FILLED * corpus.row_length / tokens) if data.packing.strategy == "best_fit" else 1.0
    examples_per_step = training.global_batch * examples_per_row
    if training.steps is not None:
        steps = training.steps
    elif training.tokens is not None:
        steps = ceil(training.tokens / (examples_per_step * tokens))
    else:
        cap = data.mixture.cap
        epoch = sum(min(len(corpus.indices[task].train), cap or len(corpus.indices[task].train)) for task in corpus.plan.tasks)
        steps = ceil((training.epochs or 0.0) * epoch / examples_per_step)
    return {
        "steps": max(1, steps),
        "tokens_per_step": round(examples_per_step * tokens, 1),
        "target_tokens_per_step": round(examples_per_step * targets, 1),
        "rows_per_window": round(data.window / examples_per_row, 1),
    }


def _mean_example(corpus: Corpus) -> tuple[float, float]:
    """(tokens, target tokens) of the mean example of the plan."""
    data = corpus.recipe.data
    shots = sum(data.shots) / 2  # their number is drawn evenly
    tokens = targets = 0.0
    for task, share in corpus.plan.shares.items():
        index = corpus.indices[task]
        few_shot = min(index.mean_tokens * (1 + shots), data.max_length)
        tokens += float(share) * (index.mean_tokens + data.formats.few_shot * (few_shot - index.mean_tokens))
        targets += float(share) * index.mean_target_tokens
    return max(tokens, 1.0), targets
