"""The corpus: everything that says what a run trains on, and how much of it a step takes.

Knows nothing of Ray's streams or of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

from apprentice.data.encoding.prompt_contract import layout_of, layout_version
from apprentice.data.encoding.prompt_format import Exemplar, Layout
from apprentice.data.encoding.quality import classes_of, layouts_of
from apprentice.data.encoding.tokenize import Tokenized, encode, encode_pairs, encode_questions
from apprentice.data.index.build import contamination_in, freeze, index_beside
from apprentice.data.index.task_index import TaskIndex, frozen_tasks
from apprentice.data.packing import Strategy
from apprentice.data.reference import Reference
from apprentice.data.sampling.mixture import Size, epoch_rows
from apprentice.data.sampling.plan import Plan
from apprentice.errors import DataError, RecipeError
from apprentice.pretrained.architecture import Family, family_of, not_packed_because
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.folder import FORMAT, Run
from apprentice.storage import Folder
from apprentice.tasks.registry import select_tasks
from apprentice.tasks.schema import Example, Task

# Of a row's tokens that a strategy fills with examples: greedy as measured, and two sides that must both fit waste more.
FILLED = {"best_fit": 0.98, "greedy": 0.85, "none": 1.0}
FILLED_PAIRS = {"best_fit": 0.9, "greedy": 0.75, "none": 1.0}
# Tuning methods whose virtual tokens stand before the row, not before each example, and ignore the positions (design, section 8).
_VIRTUAL = dict.fromkeys(("prefix", "prompt"), "the virtual tokens of prefix and prompt tuning ignore where an example begins")
_TOKEN_BYTES = 12  # three int32 for each place of a row, and a byte for each that can be trained on


@dataclass(frozen=True, eq=False)
class Corpus:
    """Everything that says what a run trains on. Picklable."""

    recipe: Recipe
    tasks: tuple[Task, ...]  # held-out ones too; packed rows name a task by its number here
    held_out: frozenset[str]
    indices: Mapping[str, TaskIndex]
    order: Plan | None  # of training; None where tasks are only scored
    layout: Layout
    strategy: Strategy = "best_fit"  # of packing, with `auto` resolved

    reference: Mapping[str, Reference] | None = None  # task → what a frozen model says of its pairs
    contamination: Mapping[str, Any] = field(default_factory=dict)  # task → what its test rows share with training rows

    @cached_property
    def qualities(self) -> dict[str, str]:
        """Task → its class of mixed-quality data; nothing where the recipe names no classes."""
        return classes_of(named, self.tasks) if (named := self.recipe.data.qualities) else {}

    @cached_property
    def _layouts(self) -> dict[str, Layout]:
        return layouts_of(self.recipe.data.qualities or {}, self.layout)

    @property
    def has_pairs(self) -> bool:
        """True if each example is a better and a worse answer."""
        return self.recipe.training.aim.pairs

    @property
    def plan(self) -> Plan:
        """The order of training."""
        assert self.order is not None, "this corpus was made for scoring alone"
        return self.order

    @property
    def family(self) -> Family:
        """`seq2seq` where rows have an encoder's and a decoder's side."""
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

    def encode(self, items: Sequence[tuple[Example, Sequence[Exemplar]]]) -> list[Tokenized | None]:
        """Token ids of every example with its exemplars; None where they do not fit (reason `TOO_LONG`).

        On-policy, those of the question alone, which leaves room for a reply.
        """
        if self.recipe.training.aim.rounds:
            room = self.recipe.data.max_length - self.recipe.training.grpo.max_new_tokens
            return encode_questions(self.layout, [example for example, _ in items], room)
        if self.has_pairs:
            return encode_pairs(self.layout, [example for example, _ in items], self.recipe.data.max_length)
        sizes = (self.recipe.data.max_length, self.target_length)
        if not self.qualities:
            return encode(self.layout, items, *sizes)
        waiting = {
            name: iter(encode(layout, [item for item in items if self.qualities[item[0].task] == name], *sizes))
            for name, layout in self._layouts.items()
        }
        return [next(waiting[self.qualities[example.task]]) for example, _ in items]


def make_corpus(recipe: Recipe, run: Run, *, parallel: bool = True, to_train: bool = True) -> Corpus:
    """The corpus of `recipe`, its index frozen in `run` (or found there); `parallel` uses Ray, which must be up.

    One that is not `to_train` has no plan, and every task may be held out; tasks that the run was not made with are indexed beside
    its index, which stays as it is.

    Raises `TaskError`, `DataError` and `RecipeError` for what the recipe names and the sources do not give.
    """
    tasks, held_out = select_tasks(recipe.data.entries, recipe.data.hold_out, Path.cwd(), to_train=to_train, find=run.tasks().find)
    tasks = tuple(task.of_format(run.format) for task in tasks)
    tokenizer = Tokenizer.load(recipe.model.base)
    cache = Folder.at(recipe.storage) / "cache"
    frozen = frozen_tasks(run.index) if not to_train else set()
    inside = [task for task in tasks if not frozen or task.name in frozen]
    indices = freeze(inside, recipe, run.index, cache, tokenizer, parallel=parallel, rules=run.format) if inside else {}
    contamination = contamination_in(run.index)
    if others := [task for task in tasks if task.name not in indices]:
        beside = index_beside(
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
    """The tasks that `run` trained on, if it kept them apart from test rows; nothing if it did not, or their rows are gone."""
    recipe = run.recipe()
    if not recipe.data.filters.decontaminate:
        return {}
    tasks, held_out = select_tasks(recipe.data.entries, recipe.data.hold_out, Path.cwd(), find=run.tasks().find)
    tasks = tuple(task.of_format(run.format) for task in tasks)
    try:
        indices = freeze(tasks, recipe, run.index, cache, tokenizer, parallel=parallel, rules=run.format)
    except DataError:
        return {}
    return {task.name: (task, indices[task.name]) for task in tasks if task.name not in held_out}


def packing_strategy(recipe: Recipe, folder: Path, run_format: int = FORMAT) -> Strategy:
    """How the rows of the model in `folder` are packed: as asked, or by `auto` the densest way that is exact.

    Runs of format 1 know recurrent models by their type alone, and go on as they began.

    Raises `RecipeError` where examples of one row would see each other, or a causal model is given a decoder's length.
    """
    packing = recipe.data.packing
    if packing.target_length is not None and family_of(folder) == "causal":
        raise RecipeError(
            f"data.packing.target_length is for encoder-decoders, and {recipe.model.base} continues one text; leave it out."
        )
    reason = not_packed_because(folder, by_layers=run_format >= 2) or _VIRTUAL.get(recipe.tuning.method)
    together = {"dpo": "both answers of a pair", "reward": "both answers of a pair", "grpo": "several replies"}
    if (what := together.get(recipe.training.objective)) and (reason is not None or family_of(folder) == "seq2seq"):
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


def estimate_steps(corpus: Corpus) -> dict[str, float]:
    """What the frozen mean lengths say of the run: the same wherever it is asked, and good to about a tenth.

    `steps` (exact where the recipe gives them), `tokens_per_step` (padding excluded), `target_tokens_per_step`,
    `rows_per_window`.
    """
    data, training = corpus.recipe.data, corpus.recipe.training
    tokens, targets = _mean_example(corpus)
    examples_per_row = _examples_per_row(corpus, tokens, targets)
    examples_per_step = training.global_batch * examples_per_row
    if training.steps is not None:
        steps = training.steps
    elif training.tokens is not None:
        steps = ceil(training.tokens / (examples_per_step * tokens))
    else:
        steps = ceil(positions_of_epochs(corpus) / examples_per_step)
    return {
        "steps": max(1, steps),
        "tokens_per_step": round(examples_per_step * tokens, 1),
        "target_tokens_per_step": round(examples_per_step * targets, 1),
        "rows_per_window": round(data.window / examples_per_row, 1),
    }


def positions_of_epochs(corpus: Corpus) -> int:
    """Positions of the plan that `training.epochs` come to: each kept row once an epoch, up to its cap."""
    sizes = {
        task.name: Size(len(corpus.indices[task.name].train), task.cluster)
        for task in corpus.tasks
        if task.name not in corpus.held_out
    }
    rows = epoch_rows(corpus.recipe.data.mixture, sizes)
    return ceil((corpus.recipe.training.epochs or 0.0) * sum(rows.values()))


def _examples_per_row(corpus: Corpus, tokens: float, targets: float) -> float:
    if corpus.recipe.training.aim.rounds:
        shape = corpus.recipe.round
        return shape.prompts * shape.group * shape.passes / shape.rows
    if corpus.strategy == "none":
        return 1.0
    if corpus.target_length is None:
        return max(1.0, FILLED[corpus.strategy] * corpus.row_length / tokens)
    fitting = min(corpus.row_length / max(tokens - targets, 1.0), corpus.target_length / max(targets, 1.0))
    return max(1.0, FILLED_PAIRS[corpus.strategy] * fitting)


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
