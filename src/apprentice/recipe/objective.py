"""What a run can learn from: the objectives of training as plain data, and the settings of each.

Knows nothing of tensors; the loss of each objective is in `apprentice.train.losses.registry`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from apprentice.recipe.strict import Strict

ObjectiveName = Literal["sft", "dpo", "reward", "grpo"]


@dataclass(frozen=True)
class Objective:
    """What an objective needs.

    `pairs`: each example is a prompt with a better and a worse answer, and the loss is a mean over pairs, not over target tokens.
    `reference`: the log-probabilities that a frozen model gives to both answers. `head`: a new last layer, which gives an answer
    one number and not the next word. `rounds`: the answers are the model's own, written and scored anew for every round.
    """

    pairs: bool = False
    reference: bool = False
    head: bool = False
    rounds: bool = False


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "sft": Objective(),
    "dpo": Objective(pairs=True, reference=True),
    "reward": Objective(pairs=True, head=True),
    "grpo": Objective(rounds=True),
}


class DPO(Strict):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: float = Field(0.1, gt=0.0, description="How strongly the model is held to the reference.")
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(0.0, description="Share of pairs that are taken to be wrong.")
    reference: str | None = Field(
        None, description="Model that is held to, named as `model.base` is; default: the base, which the run starts from."
    )


class GRPO(Strict):
    """Group relative policy optimisation (Shao et al. 2024): rounds of replies that a reward model compares.

    The prompts of a round are one window of the plan (`data.window`).
    """

    reward: str | None = Field(None, description="The reward model, named as `model.base` is; it must be given.")
    group: Annotated[int, Field(ge=2)] = Field(8, description="Replies to each prompt, which are compared with each other.")
    passes: Annotated[int, Field(ge=1)] = Field(1, description="How often a round's replies are learnt from.")
    beta: float = Field(0.04, ge=0.0, description="How strongly the policy is held to the reference, which is the base.")
    clip: float = Field(0.2, gt=0.0, lt=1.0, description="Part by which a token's probability may change within a round.")
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(128, description="Tokens of a reply.")
    actors: Annotated[int, Field(ge=1)] = Field(
        1, description="Processes that write and score replies, each for its part of the prompts, with a worker's resources."
    )
