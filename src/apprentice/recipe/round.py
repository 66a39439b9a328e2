"""Sizes of an on-policy (GRPO) round: prompts, replies, packed rows and optimizer steps.

64 prompts with 8 replies each are 512 replies. With room for 4 replies a row they fill 128 rows: 16 steps of 8 rows a pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class Round:
    """One round: `prompts` of the plan with `group` replies each, packed into rows for whole optimizer steps.

    The rows are built by `parts` actors, each from its share of the prompts, and trained on `passes` times.
    """

    prompts: int
    group: int
    replies_per_row: int  # replies that fit into a row even at their greatest length
    global_batch: int  # rows of a step
    parts: int
    passes: int

    @property
    def steps_of_a_pass(self) -> int:
        """The least number of whole steps whose rows hold all replies."""
        rows = self.parts * ceil(ceil(self.prompts / self.parts) * self.group / self.replies_per_row)
        return ceil(rows / self.global_batch)

    @property
    def steps(self) -> int:
        """Optimizer steps of one round, all passes together."""
        return self.steps_of_a_pass * self.passes

    @property
    def rows(self) -> int:
        """Rows of one round, all passes together; equal for all rounds, so that no step needs replies of the next round."""
        return self.steps * self.global_batch

    def rows_of(self, part: int) -> int:
        """Rows of one pass that the actor `part` builds; the numbers of two actors differ by at most one."""
        rows = self.steps_of_a_pass * self.global_batch
        return rows // self.parts + (part < rows % self.parts)
