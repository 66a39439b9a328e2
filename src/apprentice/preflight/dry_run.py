"""Dry run of a recipe in this process: one window of real rows, and one pass of the real model.

It shows whether every example ends with a token that is trained on, what was cut, whether packing changes the model's loss,
and how fast a worker will be. Nothing of it is kept.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from apprentice.data.encoding.tokenize import CUT_EXEMPLARS, CUT_INPUT, CUT_TURNS, LAST_TURN_ONLY
from apprentice.data.stream import Corpus, estimate_steps, render_window
from apprentice.errors import DataError, ModelError
from apprentice.models.attention.backend_choice import PackedCompute
from apprentice.models.loading import count_parameters, load_model, resolve_dtype
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.pretrained.hub import local_folder
from apprentice.recipe import Recipe, Training
from apprentice.train.batch import PackedRows
from apprentice.train.losses.loss_registry import create_loss

LARGEST = 1_500_000_000  # parameters; a larger model would take this process minutes and tens of GiB
LEAST_EXAMPLES = 5  # of a task in the window; if all of so many are cut, it is not by chance
TOKENS = 1024  # in the row that is timed, at most; a longer one takes longer and tells no more
_CLOSE = 1e-4  # relative tolerance: the order of summation in float32 changes a loss by less


@dataclass(frozen=True)
class Speed:
    """Speed on CPUs in tokens/s; None where this process cannot measure it."""

    training: float | None  # of one worker, forward and backward pass
    reading_per_cpu: float | None  # of one CPU of a worker, forward pass alone


class DryRunModel:
    """The base model of `recipe`, read from its files once."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._model: Any = None

    def load(self, dtype: torch.dtype) -> Any:
        """The model in `dtype`, with the attention that packed rows have on CPUs.

        It is the same object each time, and takes what was made of it before to that dtype.
        """
        if self._model is None:
            settings: dict[str, Any] = {"head": self._recipe.head, "trust": self._recipe.model.trust}
            if not TUNING_METHODS[self._recipe.tuning.method].virtual_tokens:
                settings["packed"] = PackedCompute("cpu", dtype)
            word = "auto" if self._recipe.model.attention == "flash" else self._recipe.model.attention  # it needs a GPU
            self._model = load_model(self._recipe.model.base, dtype, word, **settings)
        return self._model.to(dtype)


def render_first_rows(corpus: Corpus) -> PackedRows:
    """Packed rows of the first window that has any. Raises `DataError` if the first eight windows have none."""
    for window in range(8):
        rows = PackedRows.from_columns(render_window(corpus, window))
        if len(rows):
            return rows
    raise DataError(
        f"none of the first {8 * corpus.recipe.data.window:,} examples can be trained on: all of them are dropped;"
        " `apprentice prepare` says why. Often data.max_length is too short for instruction and answer."
    )


def describe_rows(corpus: Corpus, rows: PackedRows) -> str:
    """One sentence on the first window: how full its rows are, what is trained on, what was cut or dropped.

    Raises `DataError` if an example does not end with a token that is trained on, if a task has no token to train on in the
    window, or if all of its examples there were cut or dropped.
    """
    _check_ends(corpus, rows)
    examples, targets = Counter[str](), Counter[str]()
    for row in rows.facts:
        for task, count in zip(row.tasks, row.targets, strict=True):
            examples[corpus.tasks[task].name] += 1
            targets[corpus.tasks[task].name] += count
    if silent := sorted(name for name in examples if not targets[name]):
        raise DataError(f"task {silent[0]!r} has {examples[silent[0]]} examples in the first window and no token to train on.")
    _check_cut(corpus, rows, examples)
    each = {name: count / examples[name] for name, count in targets.items()}
    fewest, most = min(each, key=each.__getitem__), max(each, key=each.__getitem__)
    spread = f"{each[fewest]:.0f} an example of {fewest}" + (f", {each[most]:.0f} of {most}" if most != fewest else "")
    room = rows.input_ids.size + (0 if rows.target_ids is None else rows.target_ids.size)
    return (
        f"{sum(examples.values())} examples in {len(rows)} rows, {rows.tokens / room:.0%} full; {rows.targets / rows.tokens:.0%} of"
        f" the tokens are trained on ({spread}), each example's end among them; cut or dropped: {_cut(rows, examples)}"
    )


def describe_prompts(corpus: Corpus, rows: PackedRows) -> str:
    """One sentence on the first round of an on-policy run: its prompts, replies and steps.

    Raises `DataError` if all prompts of a task were cut or dropped.
    """
    shape, grpo = corpus.recipe.round, corpus.recipe.training.grpo
    prompts = Counter(corpus.tasks[task].name for row in rows.facts for task in row.tasks)
    _check_cut(corpus, rows, prompts)
    return (
        f"a round has {sum(prompts.values())} prompts and {shape.group} replies of at most {grpo.max_new_tokens} tokens to each, in"
        f" {shape.steps} step{'s' if shape.steps != 1 else ''}; cut or dropped: {_cut(rows, prompts)}"
    )


def _lost(rows: PackedRows) -> dict[str, Counter[str]]:
    """Numbers of examples that were cut or dropped: task → reason → number."""
    lost: dict[str, Counter[str]] = {}
    for row in rows.facts:
        for name, reasons in row.dropped.items():
            lost.setdefault(name, Counter()).update(reasons)
    return lost


def _check_cut(corpus: Corpus, rows: PackedRows, examples: Mapping[str, int]) -> None:
    """Raises `DataError` for a task with at least `LEAST_EXAMPLES` examples in the window, all of them cut or dropped."""
    for name, reasons in _lost(rows).items():
        del reasons[CUT_EXEMPLARS], reasons[LAST_TURN_ONLY]  # these leave the instruction and the answer whole
        dropped = sum(number for reason, number in reasons.items() if reason not in (CUT_INPUT, CUT_TURNS))
        count = examples[name] + dropped
        if reasons.total() >= count >= LEAST_EXAMPLES:
            why = ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in reasons.most_common())
            raise DataError(
                f"task {name!r}: all of its {count} examples in the first window are cut or dropped ({why}); raise data.max_length"
                f" ({corpus.recipe.data.max_length}), shorten the wordings, or leave the task out of data.tasks."
            )


def _cut(rows: PackedRows, examples: Mapping[str, int]) -> str:
    """The three tasks with the most examples cut or dropped, each with the share of its examples, as text."""
    cut = Counter({name: reasons.total() for name, reasons in _lost(rows).items()})
    return ", ".join(f"{count / max(examples[name], count):.0%} of {name}" for name, count in cut.most_common(3)) or "nothing"


def _check_ends(corpus: Corpus, rows: PackedRows) -> None:
    ids, segments = (rows.input_ids, rows.segment_ids) if rows.target_ids is None else (rows.target_ids, rows.target_segment_ids)
    assert segments is not None
    last = np.ones_like(segments, dtype=bool)  # whether a token is the last of its segment
    last[:, :-1] = segments[:, :-1] != segments[:, 1:]
    last &= segments > 0
    end = corpus.layout.end_ids[-1]
    wrong = last & ((rows.loss_mask == 0) | (ids != end))
    if wrong.any():
        row = rows.facts[int(np.argwhere(wrong)[0][0])]
        raise DataError(f"an example of row {row.row} in window {row.window} does not end with a token that is trained on.")


def compare_packing(corpus: Corpus, rows: PackedRows, base: DryRunModel) -> str:
    """One sentence on whether a packed row has the same loss, in float32, as its examples each in a row of its own.

    Raises `ModelError` if it has not, that is, if the model lets packed examples attend to each other.
    """
    recipe = corpus.recipe
    if corpus.strategy == "none":
        return "one example a row"
    if rows.reference is not None:
        return "two answers a pair, packed; the loss looks at whole pairs, so it is not compared with that of one example"
    if why := _too_large(corpus):
        return f"not tried: {why}"
    several = [row for row in range(len(rows)) if len(rows.facts[row].examples) > 1]
    if not several:
        return "no row of the first window holds two examples"
    row = _share(rows, min(several, key=lambda row: int((rows.segment_ids[row] > 0).sum())))
    loss = create_loss(base.load(torch.float32), _trial_training(recipe))
    with torch.no_grad():
        together = float(loss(row.micro_batches(1)[0]))
        apart = sum(float(loss(one.micro_batches(1)[0])) for one in _alone(row))
    if abs(together - apart) > _CLOSE * max(abs(apart), 1.0):
        raise ModelError(
            f"packed examples see each other in this model: a row's loss is {together:.5g}, its examples' alone {apart:.5g};"
            " set data.packing.strategy to none."
        )
    number = len(row.facts[0].examples)
    return f"the {number} examples of a row do not see each other: in one row and each alone they have the same loss"


def _trial_training(recipe: Recipe) -> Training:
    """The training settings of a trial pass; without a teacher, who has read nothing yet."""
    training = recipe.training
    return training.model_copy(update={"objective": "sft"}) if training.aim.teacher else training


def _share(rows: PackedRows, row: int) -> PackedRows:
    return rows.share(row, len(rows))


def _alone(row: PackedRows) -> list[PackedRows]:
    """The examples of one packed row, each in a row of its own."""
    return [_only(row, segment) for segment in range(1, int(row.segment_ids.max()) + 1)]


def _only(row: PackedRows, segment: int) -> PackedRows:
    in_row = row.segment_ids[0] == segment
    mine: dict[str, Any] = {"input_ids": row.input_ids[:, in_row], "positions": row.positions[:, in_row]}
    mine["segment_ids"] = np.ones_like(mine["input_ids"])
    mine["weights"] = None if row.weights is None else [row.weights[0][segment - 1 : segment]]
    if row.target_ids is None or row.target_positions is None or row.target_segment_ids is None:
        return replace(row, **mine, loss_mask=row.loss_mask[:, in_row])
    in_segment = row.target_segment_ids[0] == segment
    mine |= {"target_ids": row.target_ids[:, in_segment], "target_positions": row.target_positions[:, in_segment]}
    return replace(row, **mine, target_segment_ids=np.ones_like(mine["target_ids"]), loss_mask=row.loss_mask[:, in_segment])


def measure_speed(corpus: Corpus, rows: PackedRows, base: DryRunModel) -> Speed:
    """Measures a CPU worker's speed on one row: a forward pass, then a forward and backward pass, with a worker's threads.

    Not measured (both None) for workers with GPUs, models too large for this process, QLoRA, and on-policy training.
    """
    recipe = corpus.recipe
    if recipe.training.resources.gpus or _too_large(corpus) or recipe.tuning.method == "qlora" or recipe.training.aim.rounds:
        return Speed(None, None)
    dtype = resolve_dtype(recipe.model.dtype, "cpu")
    model = base.load(dtype)
    loss = create_loss(
        TUNING_METHODS[recipe.tuning.method].wrap(model, recipe.tuning, recipe.seed), _trial_training(recipe)
    ).train()
    fitting = [row for row in range(len(rows)) if int((rows.segment_ids[row] > 0).sum()) <= TOKENS] or [0]
    row = _share(rows, max(fitting, key=lambda row: int((rows.segment_ids[row] > 0).sum())))
    threads_before, threads = torch.get_num_threads(), max(1, int(recipe.training.resources.cpus))
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            loss(row.micro_batches(1)[0])  # warm-up
            began = time.perf_counter()
            loss(row.micro_batches(1)[0])
            reading_per_cpu = row.tokens / (time.perf_counter() - began) / threads
        began = time.perf_counter()
        loss(row.micro_batches(1)[0]).backward()
        return Speed(row.tokens / (time.perf_counter() - began), reading_per_cpu)
    finally:
        torch.set_num_threads(threads_before)


def describe_duration(corpus: Corpus, speed: Speed) -> str:
    """One sentence on the number of tokens in training, and the time it takes where the speed is known."""
    estimate = estimate_steps(corpus)
    tokens, targets = estimate["steps"] * estimate["tokens_per_step"], estimate["steps"] * estimate["target_tokens_per_step"]
    size = f"about {tokens:,.0f} tokens, {targets:,.0f} of them trained on"
    if speed.training is None:
        return f"{size}; how long it takes shows after the first steps"
    workers = corpus.recipe.training.min_workers
    time = format_duration(tokens / (speed.training * workers))
    return f"{size}; {time} at {speed.training:.0f} tokens/s a worker, beside loading and saving"


def format_duration(seconds: float) -> str:
    """A duration in words: 12 seconds are "under a minute", 100 "about 2 minutes", 9,000 "about 2.5 hours"."""
    if seconds < 60:
        return "under a minute"
    return f"about {seconds / 60:.0f} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"


def _too_large(corpus: Corpus) -> str:
    numbers = count_parameters(local_folder(corpus.recipe.model.base))
    return f"the model has {numbers / 1e9:.1f} billion numbers, too many for this process" if numbers > LARGEST else ""
