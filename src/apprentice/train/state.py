"""How far a run is: the part of a checkpoint that is not tensors; what one step brings; and when the run ends.

Pure. Knows nothing of files, models or workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from apprentice.train.metrics.mixture_ledger import Ledger


class StepOutcome(NamedTuple):
    """Of one worker: the summed loss, and what else the loss shows, summed alike. Of all: the gradient's norm before clipping."""

    nll: float
    grad_norm: float
    figures: Mapping[str, float] = MappingProxyType({})


@dataclass
class State:
    """After `step` optimizer steps. `window` and `row` name the packed row that comes next."""

    step: int = 0
    window: int = 0
    row: int = 0
    tokens: int = 0  # real tokens, padding excluded
    target_tokens: int = 0
    positions: int = 0  # of the plan: those of all windows before, and the examples trained on of this one
    loss: float = 0.0  # of the last step
    validation_loss: float | None = None  # at the last checkpoint
    ledger: Ledger = field(default_factory=Ledger)
    loss_scaling: dict[str, float] | None = None  # of float16, where the engine goes on from
    window_rows: int | None = None  # of `window`; not known where no row of it was trained on, or by an earlier version

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "ledger": self.ledger.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> State:
        return cls(**{**value, "ledger": Ledger.from_json(value["ledger"])})


@dataclass(frozen=True)
class Goal:
    """Where a run ends: after `steps`, or else with the step that reaches `tokens` or `positions` of the plan.

    `steps` is exact in the first case and an estimate in the others.
    """

    steps: int
    tokens: int | None = None
    positions: int | None = None

    def reached(self, state: State) -> float:
        """The part of the run that is done, from 0 to 1."""
        if self.tokens is not None:
            return min(state.tokens / self.tokens, 1.0)
        if self.positions is not None:
            return min(state.positions / self.positions, 1.0)
        return min(state.step / self.steps, 1.0)

    def expected_steps(self, state: State) -> int:
        """Steps that the run will have, from what the steps so far brought; never fewer than are done."""
        part = self.reached(state)
        if part == 1.0:
            return state.step
        if (self.tokens is None and self.positions is None) or state.step < 5:
            return max(self.steps, state.step + 1)
        return max(round(state.step / part), state.step + 1)
