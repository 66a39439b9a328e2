"""Training state (the part of a checkpoint that is not tensors), the outcome of a step, and the goal at which a run ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from apprentice.train.lane_position import LanePosition, start_of_lanes
from apprentice.train.metrics.mixture_ledger import Ledger


class StepOutcome(NamedTuple):
    """Outcome of one optimizer step.

    `nll` and `figures` (accuracy, reward, … by name) are sums over this worker's micro-batches. `grad_norm` is the norm of the
    gradient of all workers, before clipping.
    """

    nll: float
    grad_norm: float
    figures: Mapping[str, float] = MappingProxyType({})


@dataclass
class State:
    """Training state after `step` optimizer steps, with the position of each lane."""

    step: int = 0
    lanes: tuple[LanePosition, ...] = start_of_lanes(1)
    tokens: int = 0  # without padding
    target_tokens: int = 0
    loss: float = 0.0  # mean over the last step's targets
    validation_loss: float | None = None  # at the last checkpoint
    ledger: Ledger = field(default_factory=Ledger)
    loss_scaling: dict[str, float] | None = None  # float16 only: the state of the dynamic loss scaler

    @property
    def positions(self) -> int:
        """Positions of the sampling plan that all lanes together have done."""
        return sum(lane.positions for lane in self.lanes)

    def to_json(self) -> dict[str, Any]:
        """The state as it lies in a checkpoint's state.json: a single lane's position as keys of its own, as ever."""
        value = {**vars(self), "ledger": self.ledger.to_json()}
        lanes = value.pop("lanes")
        return value | (lanes[0]._asdict() if len(lanes) == 1 else {"lanes": [lane._asdict() for lane in lanes]})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> State:
        """The state of a checkpoint, of an earlier version too."""
        fields = {**value, "ledger": Ledger.from_json(value["ledger"])}
        single = {name: fields.pop(name) for name in LanePosition._fields if name in fields}
        return cls(**fields | {"lanes": tuple(LanePosition(**lane) for lane in fields.get("lanes", [single]))})


@dataclass(frozen=True)
class Goal:
    """End of a run: the step that reaches `tokens`, or `positions` of the sampling plan, or else step `steps`.

    With `tokens` or `positions`, `steps` is an estimate.
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
        """Total number of steps of the run, extrapolated from the steps so far; never fewer than are done."""
        part = self.reached(state)
        if part == 1.0:
            return state.step
        if (self.tokens is None and self.positions is None) or state.step < 5:
            return max(self.steps, state.step + 1)
        return max(round(state.step / part), state.step + 1)
