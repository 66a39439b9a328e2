"""What a run can learn from: the objectives of training as plain data, and the settings of each.

Knows nothing of tensors; the loss of each objective is in `apprentice.train.objective`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from apprentice.recipe.strict import Strict

ObjectiveName = Literal["sft", "dpo", "reward"]


@dataclass(frozen=True)
class Objective:
    """What an objective needs.

    `pairs`: each example is a prompt with a better and a worse answer, and the loss is a mean over pairs, not over target tokens.
    `reference`: the log-probabilities that a frozen model gives to both answers. `head`: a new last layer, which gives an answer
    one number and not the next word.
    """

    pairs: bool = False
    reference: bool = False
    head: bool = False


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "sft": Objective(),
    "dpo": Objective(pairs=True, reference=True),
    "reward": Objective(pairs=True, head=True),
}


class DPO(Strict):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: float = Field(0.1, gt=0.0, description="How strongly the model is held to the reference.")
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(0.0, description="Share of pairs that are taken to be wrong.")
    reference: str | None = Field(
        None, description="Model that is held to, named as `model.base` is; default: the base, which the run starts from."
    )
