"""The recipe's `evaluation` block: how much is scored, and how."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from apprentice.recipe.strict import Positive, Strict


class Evaluation(Strict):
    """What is scored on the test rows of every task."""

    shots: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    max_examples: Positive = Field(100, description="Test rows per task.")
    templates_per_row: Positive = Field(1, description="Wordings that each row meets.")
    max_new_tokens: Positive = 64
    baseline_shots: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="Exemplars for the base model; empty list: no base model; default: as `shots`."
    )
