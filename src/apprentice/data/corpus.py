"""The corpus: a run's tasks, frozen indices, sampling plan and prompt format in one picklable object."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from apprentice.data.encoding.prompt_contract import layout_of, layout_version
from apprentice.data.encoding.prompt_format import Layout
from apprentice.data.encoding.quality import assign_classes
from apprentice.data.index.build import contamination_in, index_scored_tasks, load_or_build_index
from apprentice.data.index.task_index import TaskIndex, indexed_tasks
from apprentice.data.packing import Strategy
from apprentice.data.reference import ReferenceLogProbs, TeacherLogProbs
from apprentice.data.sampling.plan import Plan
from apprentice.errors import DataError, RecipeError
from apprentice.pretrained.architecture import Family, family_of, packing_obstacle
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.run.identity import FORMAT
from apprentice.storage import Folder
from apprentice.tasks.registry import select_tasks
from apprentice.tasks.schema import Task

# Tuning methods that cannot pack: their virtual tokens stand before the row, not before each example, and ignore positions.
_VIRTUAL = dict.fromkeys(("prefix", "prompt"), "the virtual tokens of prefix and prompt tuning ignore where an example begins")
_TOKEN_BYTES = 12  # three int32 for each token of a row; the loss mask has one byte more for each that can be trained on


@dataclass(frozen=True, eq=False)
class Corpus:
    """Everything needed to render training and validation rows. Picklable, so that it can be sent to Ray actors."""

    recipe: Recipe
    tasks: tuple[Task, ...]  # held-out ones too; packed rows name a task by its number here
    held_out: frozenset[str]  # names of the tasks that are never trained on
    indices: Mapping[str, TaskIndex]  # task → its usable rows
    order: Plan | None  # the sampling plan; None where tasks are only scored
    layout: Layout
    strategy: Strategy = "best_fit"  # of packing, with `auto` resolved

    reference: Mapping[str, ReferenceLogProbs] | None = None  # task → log-probabilities of its pairs by the reference model
    teacher: Mapping[str, TeacherLogProbs] | None = None  # task → likeliest tokens of its targets by the teacher
    contamination: Mapping[str, Any] = field(default_factory=dict)  # task → report on test rows that share text with training rows
    working_folder: str = field(default_factory=os.getcwd)  # of the command, where the user's own modules may lie

    @cached_property
    def qualities(self) -> dict[str, str]:
        """Task → its class of mixed-quality data; empty where the recipe names no classes."""
        return assign_classes(named, self.tasks) if (named := self.recipe.data.qualities) else {}

    @property
    def has_pairs(self) -> bool:
        """True if each example is two answers to one prompt."""
        return self.recipe.training.aim.pairs

    @property
    def partner_seed(self) -> int | None:
        """Seed of each row's partner, whose answer it is compared with; None unless the objective has labelled answers."""
        return self.recipe.seed if self.recipe.training.aim.labels else None

    @property
    def plan(self) -> Plan:
        """The sampling plan. Only for a corpus made with `to_train`."""
        assert self.order is not None, "this corpus was made for scoring alone"
        return self.order

    @property
    def family(self) -> Family:
        """`causal`, or `seq2seq`, whose rows have an encoder's and a decoder's side."""
        return self.layout.family

    @property
    def row_length(self) -> int:
        """Tokens of a packed row, padding included; for an encoder-decoder, those of the encoder."""
        data = self.recipe.data
        return data.max_length * (2 if self.has_pairs else 1) if self.strategy == "none" else data.packing.length

    @property
    def target_length(self) -> int | None:
        """Tokens of the decoder's side of a row, padding included; None for causal models, whose rows have one side."""
        packing = self.recipe.data.packing
        return (packing.target_length or max(1, packing.length // 4)) if self.family == "seq2seq" else None

    @property
    def row_bytes(self) -> int:
        """Bytes of one packed row's arrays."""
        trained_on = self.target_length or self.row_length
        return _TOKEN_BYTES * (self.row_length + (self.target_length or 0)) + trained_on


def make_corpus(recipe: Recipe, run: Run, *, parallel: bool = True, to_train: bool = True) -> Corpus:
    """Builds the corpus of `recipe`, and writes its index into `run` unless it is there already.

    `parallel` scans sources with Ray, which must be initialised. Without `to_train` the corpus has no sampling plan, and every task
    may be held out; tasks that the run was not made with are then indexed in memory, and the run's own index is not changed.

    Raises `TaskError`, `DataError` or `RecipeError` where the recipe's tasks, sources or settings cannot be used.
    """
    tasks, held_out = select_tasks(recipe.data.entries, recipe.data.hold_out, Path.cwd(), to_train=to_train, find=run.tasks().find)
    tasks = tuple(task.of_format(run.format) for task in tasks)
    tokenizer = Tokenizer.load(recipe.model.base)
    cache = Folder.at(recipe.storage) / "cache"
    frozen = indexed_tasks(run.index) if not to_train else set()
    inside = [task for task in tasks if not frozen or task.name in frozen]
    indices = (
        load_or_build_index(inside, recipe, run.index, cache, tokenizer, parallel=parallel, rules=run.format) if inside else {}
    )
    contamination = contamination_in(run.index)
    if others := [task for task in tasks if task.name not in indices]:
        beside = index_scored_tasks(
            others,
            _trained(run, cache, tokenizer, parallel=parallel),
            recipe,
            cache,
            tokenizer,
            parallel=parallel,
            rules=run.format,
        )
        indices |= beside.tasks
        contamination |= beside.contamination["tasks"] if beside.contamination else {}
    strategy = packing_strategy(recipe, tokenizer.folder, run.format)
    order = Plan.of(recipe, tasks, indices) if to_train else None
    layout = layout_of(recipe, tokenizer, layout_version(run.format))
    return Corpus(recipe, tasks, held_out, indices, order, layout, strategy, contamination=contamination)


def _trained(run: Run, cache: Folder, tokenizer: Tokenizer, *, parallel: bool) -> dict[str, tuple[Task, TaskIndex]]:
    """The tasks that `run` trained on with their indices; empty without `filters.decontaminate`, or if their sources are gone."""
    recipe = run.recipe()
    if not recipe.data.filters.decontaminate:
        return {}
    tasks, held_out = select_tasks(recipe.data.entries, recipe.data.hold_out, Path.cwd(), find=run.tasks().find)
    tasks = tuple(task.of_format(run.format) for task in tasks)
    try:
        indices = load_or_build_index(tasks, recipe, run.index, cache, tokenizer, parallel=parallel, rules=run.format)
    except DataError:
        return {}
    return {task.name: (task, indices[task.name]) for task in tasks if task.name not in held_out}


def packing_strategy(recipe: Recipe, folder: Path, run_format: int = FORMAT) -> Strategy:
    """The packing strategy for the model in `folder`: the recipe's, with `auto` resolved to `best_fit` or, where unsafe, `none`.

    Runs of format 1 recognise recurrent models by their type alone, and keep the strategy that they began with.

    Raises `RecipeError` where examples that share a row would see each other, or `target_length` is set for a causal model.
    """
    packing = recipe.data.packing
    if packing.target_length is not None and family_of(folder) == "causal":
        raise RecipeError(
            f"data.packing.target_length is for encoder-decoders, and {recipe.model.base} continues one text; leave it out."
        )
    reason = packing_obstacle(folder, by_layers=run_format >= 2) or _VIRTUAL.get(recipe.tuning.method)
    what = recipe.training.aim.company.partition(",")[0]
    if what and (reason is not None or family_of(folder) == "seq2seq"):
        reason = reason or "an encoder reads a prompt once for each answer"
        raise RecipeError(
            f"training.objective {recipe.training.objective} puts {what} into one row, where they would see each"
            f" other here: {reason}; use a causal model that packs, and tuning.method full, lora, qlora or adapter."
        )
    if packing.strategy == "auto":
        return "best_fit" if reason is None else "none"
    if reason is not None and packing.strategy != "none":
        raise RecipeError(
            f"data.packing.strategy {packing.strategy} would let examples that share a row see each other: {reason};"
            " choose `none`, or `auto`, which does so by itself."
        )
    return packing.strategy
