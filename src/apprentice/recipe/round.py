"""The shape of an on-policy round: how many prompts, replies, rows and steps it has. Plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class Round:
    """One round: `prompts` of the plan with `group` replies each, laid into rows for whole optimizer steps.

    The rows are made in `parts`, each by one actor from its share of the prompts, and learnt from `passes` times.
    """

    prompts: int
    group: int
    replies_per_row: int  # so many have room, however long they are
    global_batch: int  # rows of a step
    parts: int
    passes: int

    @property
    def steps_of_a_pass(self) -> int:
        """The fewest whole steps whose rows hold all replies."""
        rows = self.parts * ceil(ceil(self.prompts / self.parts) * self.group / self.replies_per_row)
        return ceil(rows / self.global_batch)

    @property
    def steps(self) -> int:
        return self.steps_of_a_pass * self.passes

    @property
    def rows(self) -> int:
        """Of one round, all passes together; the same for every round, so that a step never waits for the next one's replies."""
        return self.steps * self.global_batch

    def rows_of(self, part: int) -> int:
        """Of one pass over what the actor `part` made: all actors give equally many, or one more."""
        rows = self.steps_of_a_pass * self.global_batch
        return rows // self.parts + (part < rows % self.parts)
