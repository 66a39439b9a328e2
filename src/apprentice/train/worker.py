"""One training worker: builds the model and its DeepSpeed engine, restores a checkpoint if there is one, and runs the loop.

Rows come in, and records and checkpoints go out, through arguments and callbacks. So it runs under Ray Train and in a plain process
that has joined a torch.distributed group alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from apprentice.models.loading import check_dtype, count_parameters, load_model, resolve_dtype
from apprentice.models.tuning.methods import TUNING_METHODS, check_tuning, count_trainable, load_trainable, trainable_parameters
from apprentice.pretrained.architecture import family_of
from apprentice.pretrained.hub import local_folder
from apprentice.recipe import Recipe
from apprentice.run.fence import FenceToken
from apprentice.run.folder import Run
from apprentice.train.batch import PackedRows
from apprentice.train.checkpoint import format as checkpoints
from apprentice.train.checkpoint.async_saver import AsyncSaver
from apprentice.train.checkpoint.format import Checkpoint
from apprentice.train.engine.collectives import Collectives
from apprentice.train.engine.deepspeed import WEIGHT, DeepSpeedEngine, checkpointing
from apprentice.train.engine.deepspeed_config import micro_batch, rows_per_worker
from apprentice.train.loop import LoopConfig, train_loop, validation_loss
from apprentice.train.losses.registry import loss_of
from apprentice.train.losses.sft import TargetLoss
from apprentice.train.memory.batch_size import has_room, largest_that_fits
from apprentice.train.memory.estimate import held
from apprentice.train.memory.measure import OutOfMemoryAdvisor, peak_memory
from apprentice.train.metrics import mfu as flops
from apprentice.train.metrics.samples import Samples
from apprentice.train.state import Goal, State


def run_worker(
    recipe: Recipe,
    run: Run,
    goal: Goal,
    restored: Checkpoint | None,
    rows: Iterator[PackedRows],
    validation: PackedRows,
    length: int,
    *,
    device: torch.device,
    tell: Callable[[dict[str, Any]], None],
    register: Callable[[Checkpoint | None, State], None],
    shares: Mapping[int, float] | None = None,
    wanted: Callable[[], bool] = lambda: False,
    samples: Samples | None = None,
    validated_aside: bool = False,
    is_empty: Callable[[int], bool] = lambda window: False,
    token: FenceToken | None = None,
) -> State:
    """Trains until `goal`; returns the last state, the same on all workers. `TrainingError` says what to change if memory runs out.

    rows             this worker's packed rows of `length` tokens: each item holds its rows of one optimizer step
    tell             gets every record (a dict); called on the first worker (rank 0) only
    register         called on every worker after each checkpoint: with the checkpoint on the first worker, with None on the others
    shares           task number → share of the examples that the mixture asks for
    wanted           says whether a checkpoint should be made after this step
    samples          prompts that the model answers every `training.sample_every_steps` steps
    validated_aside  marks the checkpoints as ones whose validation loss is computed later, by another process
    is_empty         says whether a window of the sampling plan has no rows
    token            the first worker's right to commit checkpoints to the run
    """
    collectives = Collectives()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(recipe.training.resources.cpus)))
    training, state = recipe.training, State() if restored is None else replace(restored.state)
    engine, watch = _set_up(recipe, restored, length, device=device, collectives=collectives)
    facts: dict[str, Any] = {"dtype": str(watch.dtype).removeprefix("torch."), "tuning": recipe.tuning.method}
    facts[checkpoints.VALIDATION_AWAITED] = validated_aside
    calls = _Calls(engine, goal, tell if collectives.rank == 0 else _unheard, validation, collectives)
    calls.note(state, message=_told(recipe, engine, str(facts["dtype"])))
    hearing: dict[str, Any] = {"collectives": collectives, "tell": calls.note, "register": register, "token": token}
    saver = AsyncSaver(run.checkpoints, training.checkpoint.keep, facts, round_steps=_round_steps(recipe), **hearing)

    def save(now: State) -> None:
        now.loss_scaling = engine.loss_scaling()
        saver.save(now, engine.pieces(), last=goal.reached(now) == 1.0)

    def aside(now: State) -> None:
        if samples is not None and training.sample_every_steps and now.step % training.sample_every_steps == 0:
            calls.note(now, samples=samples.taken(engine.likeliest))

    with watch.explained(), closing(saver):
        saving = {"save": save, "written": saver.written, "settle": saver.settle, "aside": aside}
        outside: dict[str, Any] = {"record": calls.record, "wanted": wanted, "is_empty": is_empty, **saving}
        course = _course(recipe, goal, engine.micro, shares or {}, _utilisation(device, watch, collectives.workers))
        state = train_loop(engine, rows, state, course, collectives=collectives, validate=lambda: calls.validate(state), **outside)
        peak = max(collectives.gather(peak_memory(device)))
        memory = {"peak": peak, "micro": engine.micro, "trained": engine.trained[0], "workers": collectives.workers}
        calls.note(state, memory=memory)
        return state


@dataclass(frozen=True)
class _Calls:
    """Callbacks of the loop on one worker: adds the step to records, and validates."""

    engine: DeepSpeedEngine
    goal: Goal
    record: Callable[[dict[str, Any]], None]
    validation: PackedRows
    collectives: Collectives

    def note(self, now: State, **figures: Any) -> None:
        self.record({"step": now.step, "steps": self.goal.expected_steps(now), **figures})

    def validate(self, now: State) -> float | None:
        if (loss := validation_loss(self.engine, self.validation, self.engine.micro, self.collectives)) is not None:
            self.note(now, validation_loss=loss)
        return loss


def _set_up(
    recipe: Recipe, restored: Checkpoint | None, length: int, *, device: torch.device, collectives: Collectives
) -> tuple[DeepSpeedEngine, OutOfMemoryAdvisor]:
    """Builds the engine, and the watch that explains errors of memory.

    Raises what `check` would for a number format or tuning method that the base model or the hardware does not support.
    """
    training, on_gpu = recipe.training, device.type != "cpu"
    check_dtype(recipe.model.dtype, local_folder(recipe.model.base), on_gpu=on_gpu)
    check_tuning(recipe.tuning, on_gpu=on_gpu)
    micro = micro_batch(training, workers=collectives.workers, length=length, on_gpu=on_gpu)
    dtype = resolve_dtype(recipe.model.dtype, device.type)
    numbers = count_parameters(local_folder(recipe.model.base))
    watch = OutOfMemoryAdvisor(recipe, numbers, dtype, micro, length, collectives.workers, device)
    with watch.explained():
        tried = length if on_gpu and _can_try(recipe) else None
        engine = build_engine(recipe, restored, dtype=dtype, micro=micro, device=device, collectives=collectives, length=tried)
    watch.micro, watch.trained = engine.micro, engine.trained[0]
    return engine, watch


def _round_steps(recipe: Recipe) -> int | None:
    return recipe.round.steps if recipe.training.aim.rounds else None


def _course(recipe: Recipe, goal: Goal, micro: int, shares: Mapping[int, float], part: float | None) -> LoopConfig:
    training = recipe.training
    rows = recipe.round.rows if training.aim.rounds else None
    every, window = training.checkpoint.every_steps, recipe.data.window
    return LoopConfig(recipe.seed, goal, training.optimizer, micro, every, window, shares, rows, part)


def _utilisation(device: torch.device, watch: OutOfMemoryAdvisor, workers: int) -> float | None:
    """Model FLOPs utilisation of one token a second on all workers together; None where the device's peak is not known."""
    of_one = flops.peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if of_one is None else flops.per_token(watch.parameters, watch.trained) / (of_one * workers)


def _can_try(recipe: Recipe) -> bool:
    """Whether the micro-batch size may be found by trying: the trial pass is that of a causal model with the `sft` loss."""
    training = recipe.training
    return training.micro_batch == "auto" and training.objective == "sft" and family_of(local_folder(recipe.model.base)) == "causal"


def _unheard(_: dict[str, Any]) -> None:
    """Drops a record: those of the other workers repeat the first one's."""


def fitted(
    recipe: Recipe,
    model: nn.Module,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    collectives: Collectives,
    *,
    loss: TargetLoss | None = None,
) -> int:
    """The largest micro-batch (rows of `length` tokens) that every worker has memory for, found by trial passes.

    All workers must call it. `loss` replaces the loss module of the recipe.
    """
    compute = dtype if recipe.training.optimizer.name == "adafactor" and dtype != torch.float32 else None
    if recipe.training.activation_checkpointing:
        checkpointing(model)
    loss = loss or loss_of(model, recipe.training, compute).to(device).train()
    trained, _ = count_trainable(model)
    state = held(recipe, 0, trained, dtype, collectives.workers)
    reserved = state.gradients + state.optimizer

    def fits(rows: int) -> bool:
        return all(collectives.gather(has_room(loss, rows, length, reserved, device)))

    return largest_that_fits(rows_per_worker(recipe.training, collectives.workers), fits)


def build_engine(
    recipe: Recipe,
    restored: Checkpoint | None,
    *,
    dtype: torch.dtype,
    micro: int,
    device: torch.device,
    collectives: Collectives,
    length: int | None = None,
) -> DeepSpeedEngine:
    """The engine over the base model with the recipe's tuning method, new or with the state of the checkpoint `restored`.

    `micro` is the number of packed rows in a micro-batch. With `length`, the tokens of a packed row, the largest micro-batch that
    fits into memory is looked for and used instead.
    """
    method = TUNING_METHODS[recipe.tuning.method]
    # Adafactor updates the weights in place, with no float32 copy, so they stay float32 whatever format multiplies.
    weights = torch.float32 if recipe.training.optimizer.name == "adafactor" else dtype
    chosen: dict[str, Any] = {"four_bit": method.four_bit, "head": recipe.head, "trust": recipe.model.trust}
    model = load_model(recipe.model.base, weights, recipe.model.attention, **chosen)
    wrapped = method.wrap(model, recipe.tuning, recipe.seed)
    if length is not None:
        micro = fitted(recipe, wrapped, length, dtype, device, collectives)
    settings: dict[str, Any] = {"dtype": dtype, "workers": collectives.workers, "micro": micro, "device": device}
    if restored is None:
        return DeepSpeedEngine(wrapped, recipe.training, **settings)
    with checkpoints.open_tensors(restored) as read:
        load_trainable(wrapped, {name: read(f"{WEIGHT}/{name}") for name in trainable_parameters(wrapped)})
        engine = DeepSpeedEngine(wrapped, recipe.training, **settings)
        engine.restore(read, restored.state.step, restored.state.loss_scaling)
    return engine


def _told(recipe: Recipe, engine: DeepSpeedEngine, dtype: str) -> str:
    """The first message of a run: tuning method, trained parameters, dtype, attention, micro-batch."""
    count, share = engine.trained
    rows = f"{engine.micro} row{'s' if engine.micro != 1 else ''} at once"
    return f"{recipe.tuning.method}: {count:,} numbers trained, {share:.2%} of all; {dtype}, attention {engine.attention}, {rows}"
