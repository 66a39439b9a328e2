"""One training worker: builds the model and its DeepSpeed engine, restores a checkpoint if there is one, and runs the loop.

Rows come in, and records and checkpoints go out, through arguments and callbacks. So it runs under Ray Train and in a plain process
that has joined a torch.distributed group alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from apprentice.errors import ModelError, TrainingError
from apprentice.models.acceleration.compilation import LENGTHS, compile_layers
from apprentice.models.acceleration.kernels import use_kernels
from apprentice.models.attention.backend_choice import PackedCompute
from apprentice.models.loading import check_dtype, count_parameters, resolve_dtype
from apprentice.models.tuning.methods import TUNING_METHODS, check_tuning, count_trainable
from apprentice.pretrained.architecture import family_of
from apprentice.pretrained.hub import local_folder
from apprentice.recipe import Recipe, Training
from apprentice.run.fence import FenceToken
from apprentice.train.batch import PackedRows
from apprentice.train.checkpoint import format as checkpoints
from apprentice.train.checkpoint.async_saver import AsyncSaver
from apprentice.train.checkpoint.format import Checkpoint, KeptRounds
from apprentice.train.checkpoint.restore import restore_model
from apprentice.train.checkpoint.shard_reader import open_tensors
from apprentice.train.checkpoint.shard_writer import save_weights
from apprentice.train.engine.activation_checkpointing import enable_activation_checkpointing
from apprentice.train.engine.collectives import Collectives
from apprentice.train.engine.deepspeed import DeepSpeedEngine
from apprentice.train.engine.deepspeed_config import choose_micro_batch, micro_batch_rows, rows_per_worker
from apprentice.train.engine.model_splitter import create_splitter, find_loading_obstacle
from apprentice.train.engine.sequence_group import SequenceGroup
from apprentice.train.lane_position import WindowShape, start_of_lanes
from apprentice.train.loop import LoopCallback, LoopConfig, compute_validation_loss, train_loop
from apprentice.train.losses.loss_registry import create_loss
from apprentice.train.losses.objective_loss import ObjectiveLoss
from apprentice.train.memory.batch_size import find_largest_fitting, fits_by_estimate, fits_into_memory
from apprentice.train.memory.estimate import estimate_memory
from apprentice.train.memory.measure import OutOfMemoryAdvisor, is_out_of_memory, peak_memory, total_memory
from apprentice.train.memory.model_size import measure_model_size
from apprentice.train.metrics.mfu import flops_per_token, peak_flops
from apprentice.train.metrics.mixture_ledger import DropCounts
from apprentice.train.optimizer import number_formats
from apprentice.train.state import Goal, State
from apprentice.train.worker_config import MicroBatchTooLargeError, WorkerConfig, WorkerEvents


def run_worker(
    config: WorkerConfig,
    restored: Checkpoint | None,
    rows: Iterator[PackedRows],
    validation: PackedRows,
    events: WorkerEvents,
    *,
    device: torch.device,
    token: FenceToken | None = None,
) -> State:
    """Trains until the goal; returns the last state, the same on all workers. `TrainingError` says how to need less memory.

    `rows` are this worker's: each item holds its packed rows of one optimizer step. Of workers that share rows, only the first one
    is asked for them. `token` is the first worker's right to commit
    checkpoints to the run.
    """
    recipe = config.recipe
    collectives = Collectives(recipe.training.sequence_parallel)
    group = SequenceGroup.join(recipe.training.sequence_parallel)
    if group is not None:
        rows = group.share(rows)
    # Also beside a GPU, where an offloaded optimizer steps on the host; Ray leaves one thread.
    torch.set_num_threads(max(1, int(recipe.training.resources.cpus)))
    state = State(lanes=start_of_lanes(recipe.data.lanes)) if restored is None else replace(restored.state)
    engine, advisor = _set_up(config, restored, device=device, collectives=collectives, group=group)
    recorder = _Recorder(config.goal, events if collectives.rank == 0 else None)
    dtype = str(advisor.dtype).removeprefix("torch.")
    recorder.add(state, message=_describe(recipe, engine, dtype))
    saver = AsyncSaver(
        config.run.checkpoints,
        recipe.training.checkpoint.keep,
        {"dtype": dtype, "tuning": recipe.tuning.method, checkpoints.VALIDATION_AWAITED: config.async_validation},
        collectives=collectives,
        report=recorder.add,
        register=events.register_checkpoint,
        kept_rounds=_kept_rounds(recipe),
        token=token,
    )
    callback = _WorkerCallback(config, engine, validation, recorder, saver, events, collectives, token)
    with _ask_for_fewer_rows(recipe.training, engine.micro), advisor.explain_errors(), closing(saver):
        loop_config = _loop_config(config, engine.micro, _mfu_per_token(device, recipe, collectives.workers))
        state = train_loop(engine, rows, state, loop_config, callback, collectives=collectives)
        peak = max(collectives.gather(peak_memory(device)))
        memory = {"peak": peak, "micro": engine.micro, "trained": engine.trained[0], "workers": collectives.workers}
        recorder.add(state, memory=memory)
        return state


@dataclass(frozen=True)
class _Recorder:
    """Adds the step to records. Those of workers without `events` are dropped: they repeat the first worker's."""

    goal: Goal
    events: WorkerEvents | None

    def add(self, state: State, **figures: Any) -> None:
        if self.events is not None:
            self.events.record({"step": state.step, "steps": self.goal.expected_steps(state), **figures})


@dataclass(frozen=True)
class _WorkerCallback(LoopCallback):
    """Callback of the loop on one worker: records, validates, saves, and writes sample replies."""

    config: WorkerConfig
    engine: DeepSpeedEngine
    validation: PackedRows
    recorder: _Recorder
    saver: AsyncSaver
    events: WorkerEvents
    collectives: Collectives
    token: FenceToken | None

    def record(self, figures: dict[str, Any]) -> None:
        if self.collectives.rank == 0:
            self.events.record(figures)

    def is_checkpoint_requested(self) -> bool:
        return self.events.is_checkpoint_requested()

    def share_weights(self, state: State) -> None:
        recipe, goal = self.config.recipe, self.config.goal
        if recipe.training.aim.rounds and state.step % recipe.round.steps == 0 and goal.reached(state) < 1.0:
            earliest = state.step - recipe.training.grpo.staleness * recipe.round.steps
            save_weights(
                self.config.run.checkpoints, self.engine.weight_shards(), state, self.token, self.collectives, earliest=earliest
            )

    def validate(self, state: State) -> float | None:
        lengths = _row_lengths(self.config.recipe.training)
        loss = compute_validation_loss(self.engine, self.validation, self.engine.micro, self.collectives, lengths)
        if loss is not None:
            self.recorder.add(state, validation_loss=loss)
        return loss

    def save(self, state: State) -> None:
        state.loss_scaling = self.engine.loss_scaling()
        self.saver.save(state, self.engine.shards(), last=self.config.goal.reached(state) == 1.0)

    def has_saved(self) -> bool:
        return self.saver.has_saved()

    def settle_save(self) -> None:
        self.saver.settle()

    def after_step(self, state: State) -> None:
        every = self.config.recipe.training.sample_every_steps
        if self.config.samples is not None and every and state.step % every == 0:
            self.recorder.add(state, samples=self.config.samples.generate(self.engine.likeliest))

    def empty_window_drops(self, window: int) -> DropCounts | None:
        return self.events.empty_window_drops(window)


def _set_up(
    config: WorkerConfig,
    restored: Checkpoint | None,
    *,
    device: torch.device,
    collectives: Collectives,
    group: SequenceGroup | None,
) -> tuple[DeepSpeedEngine, OutOfMemoryAdvisor]:
    """Builds the engine, and the watch that explains errors of memory.

    Raises what `check` would for a number format or tuning method that the base model or the hardware does not support.
    """
    recipe, length = config.recipe, config.row_length
    training, on_gpu = recipe.training, device.type != "cpu"
    check_dtype(recipe.model.dtype, local_folder(recipe.model.base), on_gpu=on_gpu)
    check_tuning(recipe.tuning)
    limit = config.largest_micro_batch if training.micro_batch == "auto" else None
    if limit is None:
        micro = choose_micro_batch(training, workers=collectives.workers, length=length, on_gpu=on_gpu)
    else:
        micro = micro_batch_rows(rows_per_worker(training, collectives.workers), 1, limit)
    dtype = resolve_dtype(recipe.model.dtype, device.type)
    parameters = count_parameters(local_folder(recipe.model.base))
    advisor = OutOfMemoryAdvisor(recipe, parameters, dtype, micro, length, collectives.workers, device)
    with advisor.explain_errors():
        trial_length = length if limit is None and on_gpu and _can_try(recipe) else None
        settings: dict[str, Any] = {"dtype": dtype, "micro": micro, "device": device, "collectives": collectives}
        engine = build_engine(recipe, restored, **settings, trial_length=trial_length, group=group)
    advisor.micro, advisor.trained = engine.micro, engine.trained[0]
    return engine, advisor


@contextmanager
def _ask_for_fewer_rows(training: Training, micro: int) -> Iterator[None]:
    """Raises `MicroBatchTooLargeError` instead of the error of memory raised inside, if `auto` may take less than `micro` rows."""
    try:
        yield
    except TrainingError as error:
        cause = error.__cause__
        if training.micro_batch == "auto" and micro > 1 and cause is not None and is_out_of_memory(cause):
            raise MicroBatchTooLargeError(micro, error) from error
        raise


def _loop_config(config: WorkerConfig, micro: int, mfu_per_token: float | None) -> LoopConfig:
    recipe, training = config.recipe, config.recipe.training
    return LoopConfig(
        seed=recipe.seed,
        goal=config.goal,
        optimizer=training.optimizer,
        micro_batch=micro,
        checkpoint_every_steps=training.checkpoint.every_steps,
        window=WindowShape(recipe.data.window, recipe.data.lanes, recipe.round.rows if training.aim.rounds else None),
        requested_shares=config.requested_shares,
        mfu_per_token=mfu_per_token,
        lengths=_row_lengths(training),
        is_token_mean=training.aim.rounds and training.grpo.loss_mean == "tokens",
    )


def _kept_rounds(recipe: Recipe) -> KeptRounds | None:
    """The rounds of an on-policy run whose weights may still write replies."""
    return KeptRounds(recipe.round.steps, 1 + recipe.training.grpo.staleness) if recipe.training.aim.rounds else None


def _row_lengths(training: Training) -> int | None:
    """Number of different lengths that micro-batches may have; None: any."""
    return LENGTHS if training.compile else None


def _mfu_per_token(device: torch.device, recipe: Recipe, workers: int) -> float | None:
    """Model FLOPs utilisation of one token a second on all workers together, over the numbers that a token meets.

    None where the device's peak is not known, or the model's size cannot be told from its config.json.
    """
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return None
    try:
        active = measure_model_size(recipe, resolve_dtype(recipe.model.dtype, device.type)).active
    except ModelError:
        return None
    return flops_per_token(active.weights, active.trained) / (peak * workers)


def _can_try(recipe: Recipe) -> bool:
    """Whether the micro-batch size may be found by trying: the trial pass is that of a causal model with the `sft` loss."""
    training = recipe.training
    return training.micro_batch == "auto" and training.objective == "sft" and family_of(local_folder(recipe.model.base)) == "causal"


def find_micro_batch(
    recipe: Recipe,
    model: nn.Module,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    collectives: Collectives,
    *,
    loss: ObjectiveLoss | None = None,
) -> int:
    """The largest micro-batch (rows of `length` tokens) that every worker has memory for, found by trial passes.

    All workers must call it. `loss` replaces the loss module of the recipe.
    """
    training = recipe.training
    enable_activation_checkpointing(model, training.activation_checkpointing)
    loss = loss or create_loss(model, training, number_formats(training.optimizer, dtype).autocast).to(device).train()
    trained, _ = count_trainable(model)
    state = estimate_memory(recipe, 0, trained, dtype, collectives.workers)
    reserved = state.gradients + state.optimizer + state.buffers

    def fits(rows: int) -> bool:
        return all(collectives.gather(fits_into_memory(loss, rows, length, reserved, device)))

    return find_largest_fitting(rows_per_worker(training, collectives.workers), fits)


def estimate_micro_batch(recipe: Recipe, length: int, dtype: torch.dtype, collectives: Collectives, memory: float) -> int:
    """The largest micro-batch (rows of `length` tokens) that is estimated to fit every worker's GPU; this worker's has `memory`.

    All workers must call it.
    """
    parameters = count_parameters(local_folder(recipe.model.base))
    least = min(collectives.gather(memory))
    fits = fits_by_estimate(recipe, parameters, dtype, collectives.workers, length, least)
    return find_largest_fitting(rows_per_worker(recipe.training, collectives.workers), fits)


def build_engine(
    recipe: Recipe,
    restored: Checkpoint | None,
    *,
    dtype: torch.dtype,
    micro: int,
    device: torch.device,
    collectives: Collectives,
    trial_length: int | None = None,
    group: SequenceGroup | None = None,
) -> DeepSpeedEngine:
    """The engine over the base model with the recipe's tuning method, new or with the state of the checkpoint `restored`.

    `micro` is the number of packed rows in a micro-batch. With `trial_length`, the tokens of a packed row, the largest micro-batch
    that fits into memory is looked for and used instead. `group` are the workers that share rows with this one.
    """
    weights = number_formats(recipe.training.optimizer, dtype).weights
    base, four_bit = local_folder(recipe.model.base, trust=recipe.model.trust), TUNING_METHODS[recipe.tuning.method].four_bit
    splitter = create_splitter(
        recipe.training, base, four_bit=four_bit, weights=weights, micro=micro, device=device, collectives=collectives
    )
    packed = PackedCompute.on(device, dtype, recipe.training.sequence_parallel)
    model = restore_model(recipe, None, weights, packed=packed, splitter=splitter)
    # Compiled layers fuse these operations by themselves.
    use_kernels(model, "none" if recipe.training.compile else recipe.training.kernels, device)
    if trial_length is not None and splitter is None and group is None:
        micro = find_micro_batch(recipe, model, trial_length, dtype, device, collectives)
    elif trial_length is not None:  # one worker that ran out in a trial would leave the others waiting
        micro = estimate_micro_batch(recipe, trial_length, dtype, collectives, total_memory(device))
    if recipe.training.compile:  # after the trials, whose shapes would each take minutes
        compile_layers(model)
    settings: dict[str, Any] = {"dtype": dtype, "workers": collectives.workers, "micro": micro, "device": device}
    engine = DeepSpeedEngine(model, recipe.training, **settings, sequence_group=group)
    if restored is not None:
        with open_tensors(restored) as reader:
            engine.restore(reader, restored.state.step, restored.state.loss_scaling)
    return engine


def _describe(recipe: Recipe, engine: DeepSpeedEngine, dtype: str) -> str:
    """The first message of a run: tuning method, trained parameters, dtype, attention, kernels if Liger's, micro-batch."""
    count, share = engine.trained
    rows = f"{engine.micro} row{'s' if engine.micro != 1 else ''} at once"
    numbers = f"{recipe.tuning.method}: {count:,} numbers trained, {share:.2%} of all"
    kernels = ", kernels liger" if engine.has_liger else ""
    return f"{numbers}; {dtype}, attention {engine.attention}{kernels}, {rows}{_describe_whole_loading(recipe)}"


def _describe_whole_loading(recipe: Recipe) -> str:
    """Why the workers of a run at stage 3 did not split the model as they loaded it; nothing where they did."""
    if recipe.training.deepspeed.stage < 3:
        return ""
    base, four_bit = local_folder(recipe.model.base, trust=recipe.model.trust), TUNING_METHODS[recipe.tuning.method].four_bit
    obstacle = find_loading_obstacle(recipe.training, base, four_bit=four_bit)
    return "" if obstacle is None else f"; each worker loaded the whole model before it was split, because {obstacle}"
