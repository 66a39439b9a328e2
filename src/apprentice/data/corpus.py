"""The corpus: a run's tasks, frozen indices, sampling plan and prompt format in one picklable object, and its length in steps."""

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
from apprentice.data.reference import ReferenceLogProbs
from apprentice.data.sampling.mixture import Size, epoch_rows
from apprentice.data.sampling.plan import Plan
from apprentice.errors import DataError, RecipeError
from apprentice.pretrained.architecture import Family, family_of, packing_obstacle
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.run.identity import FORMAT
from apprentice.storage import Folder
from apprentice.tasks.registry import select_tasks
from apprentice.tasks.schema import Example, Task

# Share of a row's tokens that each packing strategy fills with examples; two sides that must both fit waste more.
FILLED = {"best_fit": 0.98, "greedy": 0.85, "none": 1.0}
FILLED_PAIRS = {"best_fit": 0.9, "greedy": 0.75, "none": 1.0}
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
    contamination: Mapping[str, Any] = field(default_factory=dict)  # task → report on test rows that share text with training rows

    @cached_property
    def qualities(self) -> dict[str, str]:
        """Task → its class of mixed-quality data; empty where the recipe names no classes."""
        return classes_of(named, self.tasks) if (named := self.recipe.data.qualities) else {}

    @cached_property
    def _layouts(self) -> dict[str, Layout]:
        return layouts_of(self.recipe.data.qualities or {}, self.layout)

    @property
    def has_pairs(self) -> bool:
        """True if each example is a preference pair: a better and a worse answer to one prompt."""
        return self.recipe.training.aim.pairs

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

    def encode(self, items: Sequence[tuple[Example, Sequence[Exemplar]]]) -> list[Tokenized | None]:
        """Token ids of every (example, exemplars); None for an example that is dropped (see `tokenize.drop_reason`).

        An on-policy run gets the prompt alone, short enough that `grpo.max_new_tokens` of a reply fit behind it.
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
    """Builds the corpus of `recipe`, and writes its index into `run` unless it is there already.

    `parallel` scans sources with Ray, which must be initialised. Without `to_train` the corpus has no sampling plan, and every task
    may be held out; tasks that the run was not made with are then indexed in memory, and the run's own index is not changed.

    Raises `TaskError`, `DataError` or `RecipeError` where the recipe's tasks, sources or settings cannot be used.
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
    """The tasks that `run` trained on with their indices; empty without `filters.decontaminate`, or if their sources are gone."""
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
    """Estimates a run's size from the mean example lengths in the index: deterministic, and good to about a tenth.

    Keys: `steps` (exact where the recipe gives them), `tokens_per_step` (without padding), `target_tokens_per_step` and
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
    """Number of plan positions in `training.epochs` epochs; an epoch has each kept row of a task once, up to the mixture's cap."""
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
    """Mean (tokens, target tokens) of the plan's examples, tasks weighted by their shares."""
    data = corpus.recipe.data
    shots = sum(data.shots) / 2  # mean of a uniform draw between the two bounds
    tokens = targets = 0.0
    for task, share in corpus.plan.shares.items():
        index = corpus.indices[task]
        few_shot = min(index.mean_tokens * (1 + shots), data.max_length)
        tokens += float(share) * (index.mean_tokens + data.formats.few_shot * (few_shot - index.mean_tokens))
        targets += float(share) * index.mean_target_tokens
    return max(tokens, 1.0), targets
