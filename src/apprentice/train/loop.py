"""The training loop: takes packed rows, makes optimizer steps, and gives out records and checkpoints.

    rows of one step ─▶ agree with all workers ─▶ are they the next rows of the plan? ─▶ optimizer step ─▶ record ─▶ checkpoint

The engine and the rows are arguments, and everything else that the loop tells or asks goes to a `LoopCallback`, so it runs under
Ray Train and in a plain process alike. `share_weights` follows each `record`, and `after_step` ends each step; else, in a run of 5
steps with a checkpoint every 2, the callback's methods are called so:

    record(1)  record(2) validate save(2)  record(3) settle_save  record(4) validate save(4)  record(5) settle_save
    validate save(5)
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from apprentice.errors import TrainingError
from apprentice.recipe import Optimizer
from apprentice.train.batch import MicroBatch, PackedRows, RowFacts
from apprentice.train.engine.collectives import Collectives
from apprentice.train.engine.forward_passes import ForwardEngine, sum_losses
from apprentice.train.lane_position import LanePosition, WindowShape, advance_position, in_step_order, skipped_drops
from apprentice.train.losses.kto import measure_baseline, with_baseline
from apprentice.train.metrics.mixture_ledger import DropCounts
from apprentice.train.optimizer import learning_rate
from apprentice.train.state import Goal, State, StepOutcome

RECENT_STEPS = 20  # over which speed and remaining time are averaged


class TrainingEngine(ForwardEngine, Protocol):
    """Anything that makes optimizer steps, such as `DeepSpeedEngine`."""

    def train_step(self, batches: Sequence[MicroBatch], scale: float, rate: float) -> StepOutcome:
        """One step with learning rate `rate`, on the loss of `batches` summed over all workers and times `scale`."""
        ...


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the loop."""

    seed: int
    goal: Goal
    optimizer: Optimizer
    micro_batch: int  # packed rows
    checkpoint_every_steps: int
    window: WindowShape
    requested_shares: Mapping[int, float] = field(default_factory=dict)  # task number → share of the examples
    mfu_per_token: float | None = None  # MFU for each token a second; None where the devices' peak is not known
    lengths: int | None = None  # number of different lengths that micro-batches may have; None: any
    is_token_mean: bool = False  # the loss is divided by the step's target tokens, whatever its rows count


class LoopCallback:
    """What the loop tells and asks the process around it. Methods are called on every worker; here they do nothing.

    Time spent in them is not counted in a step's seconds.
    """

    def record(self, figures: dict[str, Any]) -> None:
        """Takes the figures of a finished step."""

    def is_checkpoint_requested(self) -> bool:
        """Whether a checkpoint should follow this step; if so on any worker, it does at once, without validation."""
        return False

    def share_weights(self, state: State) -> None:
        """Gives the weights to whoever needs them beside training; called in each step, before a checkpoint is saved."""

    def validate(self, state: State) -> float | None:
        """Validation loss; asked every `checkpoint_every_steps` steps and at the end, just before `save`."""
        return None

    def save(self, state: State) -> None:
        """Saves a checkpoint; it may go on writing in the background."""

    def has_saved(self) -> bool:
        """Whether the last save is over; once it is on every worker, `settle_save` follows the next step."""
        return False

    def settle_save(self) -> None:
        """Registers the result of the last save."""

    def after_step(self, state: State) -> None:
        """Called last in each step."""

    def empty_window_drops(self, window: int) -> DropCounts | None:
        """Drop counts of a window without rows, None for one with rows; asked about windows that the stream skips."""
        return None


@dataclass(frozen=True)
class _GlobalStep:
    """One optimizer step, put together from all workers."""

    rows: list[RowFacts]  # of all workers, row r of lane r mod lanes
    tokens: int
    targets: int
    counted: float  # the loss's denominator: weighted target tokens, preference pairs or replies
    is_checkpoint_requested: bool  # by some worker
    has_saved: bool  # the save before is over on all workers

    @property
    def examples(self) -> list[int]:
        """Positions of the sampling plan in these rows."""
        return [position for row in self.rows for position in row.examples]

    def by_lane(self, state: State) -> list[tuple[LanePosition, list[RowFacts]]]:
        """Each lane's position in `state`, and its rows in the order of its stream."""
        return [(place, self.rows[lane :: len(state.lanes)]) for lane, place in enumerate(state.lanes)]


def train_loop(
    engine: TrainingEngine,
    batches: Iterator[PackedRows],
    state: State,
    config: LoopConfig,
    callback: LoopCallback,
    *,
    collectives: Collectives,
) -> State:
    """Trains from `state` to the goal and returns the state, changed in place. Each batch is this worker's part of one step.

    Raises `TrainingError` if the loss or gradient is not finite, the stream ends early, or a step's rows are not the next ones of
    the sampling plan.
    """
    timer = _StepTimer()
    saved_step = state.step  # of the newest checkpoint
    while config.goal.reached(state) < 1.0:
        rows = _next_rows(batches, state)
        timer.data_came()
        step = _gather_step(rows, len(state.lanes), callback, collectives)
        for place, facts in step.by_lane(state):
            for drops in skipped_drops(place, facts, config.window, state.step + 1, callback.empty_window_drops):
                state.ledger.add_drops(drops)
        outcome, rate = _one_step(engine, rows, step, state, config, collectives)
        timer.step_done(step.tokens)
        callback.record(
            _figures(state, step, outcome, config, collectives) | {"learning_rate": rate, **timer.figures(config, state)}
        )
        if not (math.isfinite(state.loss) and math.isfinite(outcome.grad_norm)):
            raise _not_finite(state, step, saved_step)
        if step.has_saved:
            callback.settle_save()
        callback.share_weights(state)
        is_due = state.step % config.checkpoint_every_steps == 0 or config.goal.reached(state) == 1.0
        if is_due or step.is_checkpoint_requested:
            state.validation_loss = callback.validate(state) if is_due else None
            callback.save(state)
            saved_step = state.step
        callback.after_step(state)
        timer.restart()
    return state


def _figures(state: State, step: _GlobalStep, outcome: StepOutcome, config: LoopConfig, collectives: Collectives) -> dict[str, Any]:
    return {
        "step": state.step,
        "steps": config.goal.expected_steps(state),
        "loss": state.loss,
        "grad_norm": outcome.grad_norm,
        "tokens": step.tokens,
        "target_tokens": step.targets,
        "workers": collectives.workers,
        "examples": step.examples,
        **outcome.figures,
        "ledger_drift": round(state.ledger.drift(config.requested_shares), 6),
    }


def _one_step(
    engine: TrainingEngine, rows: PackedRows, step: _GlobalStep, state: State, config: LoopConfig, collectives: Collectives
) -> tuple[StepOutcome, float]:
    """Makes one optimizer step and updates `state`. Returns its outcome, with figures averaged over all workers, and its rate."""
    estimate = config.goal.steps
    rate = learning_rate(config.optimizer, state.step, config.goal.reached(state) * estimate, estimate)
    torch.manual_seed(_step_seed(config.seed, state.step, collectives.rank))
    counted = (
        step.targets if config.is_token_mean else step.counted
    ) or 1  # a step without target tokens has loss 0; do not divide by 0
    batches = rows.micro_batches(config.micro_batch, config.lengths)
    if rows.desirable is not None:
        batches = with_baseline(batches, measure_baseline(engine, rows, config.micro_batch, collectives, config.lengths))
    outcome = engine.train_step(batches, 1.0 / counted, rate)
    nll, *figures = collectives.sum([outcome.nll, *outcome.figures.values()])
    figures = [total / (step.counted or 1) for total in figures]
    _advance(state, step, config.window, nll / counted)
    return outcome._replace(figures=dict(zip(outcome.figures, figures, strict=True))), rate


def compute_validation_loss(
    engine: ForwardEngine, rows: PackedRows, micro: int, collectives: Collectives, lengths: int | None = None
) -> float | None:
    """Mean loss over the target tokens (or pairs) of `rows`; None without any. All workers must call it with the same rows.

    `micro` and `lengths` are those of `LoopConfig`.
    """
    if len(rows) == 0 or rows.loss_denominator == 0:
        return None
    share = rows.share(collectives.reader, collectives.readers)
    # ZeRO-3 gathers weights in each pass, so all workers make equally many: one with fewer repeats one, uncounted.
    rounds = math.ceil(math.ceil(len(rows) / collectives.readers) / micro)
    spare = rows.share(0, len(rows))
    mine, more = share.micro_batches(micro, lengths), spare.micro_batches(micro, lengths)
    if rows.desirable is not None:
        baseline = measure_baseline(engine, share, micro, collectives, lengths, spare=spare, rounds=rounds)
        mine, more = with_baseline(mine, baseline), with_baseline(more, baseline)
    return sum_losses(engine, mine, more[0], rounds, collectives) / rows.loss_denominator


def _next_rows(batches: Iterator[PackedRows], state: State) -> PackedRows:
    try:
        return next(batches)
    except StopIteration:
        message = f"the stream of training rows ended after step {state.step}, before the run did"
        raise TrainingError(f"{message}; this is a defect of the data pipeline.") from None


def _gather_step(rows: PackedRows, lanes: int, callback: LoopCallback, collectives: Collectives) -> _GlobalStep:
    mine = (rows.facts, rows.tokens, rows.targets, rows.loss_denominator, callback.is_checkpoint_requested(), callback.has_saved())
    answers = collectives.gather(mine)
    *_, requests, saves = zip(*answers, strict=True)
    each_once = answers[:: collectives.workers // collectives.readers]  # workers that share rows say the same of them
    parts, tokens, targets, counted, *_ = zip(*each_once, strict=True)
    facts = in_step_order([fact for part in parts for fact in part], lanes)
    return _GlobalStep(facts, sum(tokens), sum(targets), sum(counted), any(requests), all(saves))


def _advance(state: State, step: _GlobalStep, window: WindowShape, loss: float) -> None:
    state.lanes = tuple(advance_position(place, facts, window) for place, facts in step.by_lane(state))
    state.step += 1
    state.tokens += step.tokens
    state.target_tokens += step.targets
    state.loss = loss
    state.ledger.add(step.rows)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of dropout: a hash of run seed, step and rank, so that it does not depend on interruptions."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:7], "big")


def _not_finite(state: State, step: _GlobalStep, saved_step: int) -> TrainingError:
    positions = ", ".join(map(str, step.examples[:20])) + (" …" if len(step.examples) > 20 else "")
    checkpoint = f"the last good checkpoint is that of step {saved_step}" if saved_step else "there is no checkpoint yet"
    return TrainingError(
        f"step {state.step}: the loss or its gradient is not a number (loss {state.loss}), with the plan's positions {positions};"
        f" {checkpoint}. Try a lower training.optimizer.learning_rate, more warmup_steps, a smaller clip or model.dtype float32,"
        " or look at these examples with `apprentice preview`."
    )


class _StepTimer:
    """Measures the seconds of steps and of waiting for data, over the last `RECENT_STEPS` steps."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float, int]] = deque(maxlen=RECENT_STEPS)  # seconds, those of waiting for data, tokens
        self._steps = 0
        self.restart()

    def restart(self) -> None:
        """Starts the next step's time now, so that validation or saving is not counted."""
        self._begin = time.perf_counter()

    def data_came(self) -> None:
        self._waited = time.perf_counter() - self._begin

    def step_done(self, tokens: int) -> None:
        now = time.perf_counter()
        if self._steps == 1:
            self._recent.clear()  # the first step includes start-up
        self._steps += 1
        self._recent.append((now - self._begin, self._waited, tokens))
        self._begin = now

    def figures(self, config: LoopConfig, state: State) -> dict[str, float]:
        seconds, waited, tokens = (sum(column) for column in zip(*self._recent, strict=True))
        return {
            "seconds": self._recent[-1][0],
            "data_wait_s": self._recent[-1][1],
            "tokens_per_s": tokens / seconds,
            **({} if config.mfu_per_token is None else {"mfu": config.mfu_per_token * tokens / seconds}),
            "data_wait": waited / seconds,
            "eta_s": (config.goal.expected_steps(state) - state.step) * seconds / len(self._recent),
        }
