"""TimeLedger: where the wall time of a training run went, and its goodput.

Every second since the run's first start belongs to one entry of `TimeLedger.seconds`:

    steps         optimizer steps that counted
    lost_steps    steps that a fault undid, and the step that it interrupted
    data          workers waited for rows, or for the replies of an on-policy round
    checkpoints   training waited for checkpoints, weights or the exported model to be written
    validation    validation and sample replies between steps
    starting      processes, stream, model, and the first rows
    nodes         waiting for nodes of the cluster
    down          nothing ran: after a fault, until the next start
    stopped       nothing ran: a person had stopped the run

Example: steps 1 to 4 take 2 s each, a checkpoint follows step 2, and a worker dies in step 5, one second after step 4. Training
goes on 30 s later with step 3: `lost_steps` holds 5 s, `starting` 30 s, and step 3 and all after it count again.

The goodput is the share of `steps` in all seconds but the stopped ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("steps", "lost_steps", "data", "checkpoints", "validation", "starting", "nodes", "down", "stopped")
MOST_BLOCKS = 64  # between checkpoints; older ones are forgotten, and their seconds stay, since no run goes back so far


@dataclass
class TimeLedger:
    """Seconds by kind. `blocks` holds first step, last step and seconds of the steps after each checkpoint, oldest first.

    `at` is the Unix time up to which all seconds are entered, and `end` tells how the run ended then: "person", "fault", or
    "" while it was running.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    blocks: list[list[float]] = field(default_factory=list)
    faults: int = 0
    at: float = 0.0
    end: str = ""

    @classmethod
    def from_status(cls, status: Mapping[str, Any]) -> TimeLedger | None:
        """The ledger kept in a run's status.json; None for a run that has none."""
        values = status.get("time")
        if values is None:
            return None
        return cls(**values | {"seconds": dict.fromkeys(KINDS, 0.0) | values["seconds"]})

    @property
    def goodput(self) -> float:
        """Share of the steps that counted in the wall time that nobody stopped; 0 before the first step."""
        running = sum(self.seconds.values()) - self.seconds["stopped"]
        return self.seconds["steps"] / running if running else 0.0

    def enter(self, kind: str, seconds: float) -> None:
        """Adds `seconds` of `kind`."""
        self.seconds[kind] += max(0.0, seconds)

    def enter_step(self, step: int, seconds: float) -> None:
        """Adds the seconds of optimizer step `step`."""
        self.enter("steps", seconds)
        if not self.blocks:
            self.begin_block()
        block = self.blocks[-1]
        if block[1] == 0:
            block[0] = step
        block[1], block[2] = step, block[2] + max(0.0, seconds)

    def begin_block(self) -> None:
        """Begins a block: a checkpoint has been made, and a fault may take training back to it."""
        if self.blocks and self.blocks[-1][1] == 0:
            return
        self.blocks.append([0, 0, 0.0])
        del self.blocks[:-MOST_BLOCKS]

    def go_back(self, step: int) -> None:
        """Training goes on after `step`: the seconds of later steps become lost ones."""
        while self.blocks and (self.blocks[-1][1] == 0 or self.blocks[-1][0] > step):
            _, _, seconds = self.blocks.pop()
            self._lose(seconds)
        if self.blocks and self.blocks[-1][1] > step:  # a checkpoint inside a block: each of its steps took about as long
            first, last, seconds = self.blocks[-1]
            lost = seconds * (last - step) / (last - first + 1)
            self.blocks[-1] = [first, step, seconds - lost]
            self._lose(lost)
        self.begin_block()

    def _lose(self, seconds: float) -> None:
        self.seconds["steps"] -= seconds
        self.seconds["lost_steps"] += seconds

    def describe(self) -> str:
        """One sentence: goodput, and every kind that took at least a thousandth of the time, the largest first."""
        total = sum(self.seconds.values())
        shares = sorted(((seconds / total, kind) for kind, seconds in self.seconds.items()), reverse=True) if total else []
        parts = ", ".join(f"{kind.replace('_', ' ')} {share:.1%}" for share, kind in shares if share >= 0.001)
        faults = "no fault" if self.faults == 0 else f"{self.faults} fault{'s' if self.faults > 1 else ''}"
        return f"goodput {self.goodput:.1%}, {faults}; of {total:,.0f} s: {parts}"
