"""The recipe's `evaluation` block: number of rows, wordings and exemplars, scoring rules, and the quality gate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from apprentice.recipe.strict import Positive, Strict

Perturbation = Literal["case", "punctuation", "synonyms", "choice_order", "input_first", "politeness"]


class Gate(Strict):
    """The quality gate: bounds on a tuned model's scores; every bound that is given must hold."""

    held_out: float | None = Field(None, description="Points that the mean of held-out tasks must lie above the base model's.")
    trained_on: float | None = Field(None, description="The same for the tasks trained on.")
    worst_wording: float | None = Field(
        None, description="Points that the mean over tasks of the worst wording must lie above the base model's."
    )
    tasks: dict[str, float] = Field({}, description="Task → least score.")
    certain: bool = Field(False, description="Not the means but the low ends of their 95% intervals must reach the bounds.")


class Evaluation(Strict):
    """The scoring of the test rows of every task."""

    shots: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), min_length=1, description="Numbers of exemplars; every test row is asked with each of them."
    )
    max_examples: Positive = Field(100, description="Test rows per task.")
    templates_per_row: Positive | Literal["all"] = Field(1, description="Wordings that each row meets.")
    while_training: Annotated[int, Field(ge=0)] = Field(
        0, description="Test rows of each held-out task that are scored at each checkpoint, aside; 0: none."
    )
    max_new_tokens: Positive = Field(64, description="Tokens of a reply at most.")
    baseline_shots: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="Exemplars for the base model; empty list: no base model; default: as `shots`."
    )
    rank_by: Literal["sum", "mean", "pmi"] = Field(
        "sum", description="Choices by summed log-probability (T0), by its mean per token, or less that after an empty question."
    )
    perturbations: tuple[Perturbation, ...] = Field((), description="Each row is asked once more with each of these changes.")
    judge: str | None = Field(
        None,
        description="A reward model (run:NAME, folder or hub id) that says which of two written replies is better.",
    )
    gate: Gate | None = Field(None, description="What the tuned model has to reach; `apprentice evaluate` ends with 1 otherwise.")
