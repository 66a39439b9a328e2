"""Configuration of a training worker, the same for all workers of a run, and the events that leave it.

The worker itself (worker.py) imports the code of all models; this file does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from apprentice.errors import TrainingError
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.train.metrics.mixture_ledger import DropCounts
from apprentice.train.metrics.samples import SampleReplies
from apprentice.train.state import Goal, State

if TYPE_CHECKING:
    from apprentice.train.checkpoint.format import Checkpoint


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker trains, and until when."""

    recipe: Recipe
    run: Run
    goal: Goal
    row_length: int  # tokens of a packed row, on both sides of an encoder-decoder
    requested_shares: Mapping[int, float] = field(default_factory=dict)  # task number → share of the examples
    samples: SampleReplies | None = None  # made every `training.sample_every_steps` steps
    async_validation: bool = False  # checkpoints are validated later, by another process
    largest_micro_batch: int | None = None  # packed rows that `micro_batch: auto` may take at most; None: not limited


class MicroBatchTooLargeError(RuntimeError):
    """Running out of memory in a step with `micro` packed rows at once, where `micro_batch: auto` may take fewer.

    `cause` is the error that says what else helps; an attribute, since `__cause__` does not go from one process to another.
    """

    def __init__(self, micro: int, cause: TrainingError) -> None:
        super().__init__(f"memory ran out with {micro} rows at once")
        self.micro, self.cause = micro, cause

    def __reduce__(self) -> Any:
        return (type(self), (self.micro, self.cause))


class WorkerEvents(Protocol):
    """What a worker tells and asks its run."""

    def record(self, figures: dict[str, Any]) -> None:
        """Takes a record (step, validation, samples, message …); called on the first worker (rank 0) only."""

    def register_checkpoint(self, checkpoint: Checkpoint | None, state: State) -> None:
        """Called on every worker after each save, with the checkpoint on the first worker and None on the others."""

    def is_checkpoint_requested(self) -> bool:
        """Whether a checkpoint should be made after this step."""
        ...

    def empty_window_drops(self, window: int) -> DropCounts | None:
        """Drop counts of a window of the sampling plan without rows; None for one with rows."""
        ...
