"""The terms of a reward for on-policy training: functions of a reply's text, and reward models."""

from __future__ import annotations

import re
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from apprentice.recipe.strict import Positive, Strict

PYTHON = "python:"  # prefix of a function of the user's own
_PYTHON_FUNCTION = re.compile(r"python:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_TEXT_FUNCTIONS = ("exact_match", "math", "json_schema", "regex")


class RewardTerm(Strict):
    """One term of a reply's reward: a function of its text, or a reward model. Terms are summed with their weights."""

    function: str | None = Field(
        None,
        description="exact_match: 1 for the text of an answer of the row; math: 1 for the final number or expression of one;"
        " json_schema: 1 for JSON that `json_schema` allows; regex: 1 where `pattern` matches the whole reply;"
        " python:MODULE:FUNCTION: the numbers of a function of your own.",
    )
    model: str | None = Field(None, description="A reward model, named as `model.base` is, instead of a function.")
    weight: float = Field(1.0, allow_inf_nan=False, description="Factor of the term in the reward.")
    pattern: str | None = Field(None, description="Of function regex, in Python's syntax; `.` matches line breaks too.")
    json_schema: dict[str, Any] | None = Field(None, description="Of function json_schema: the schema that the reply must fit.")
    cpu_s: Positive = Field(
        10,
        description="Most seconds of processor time for a reply, or a call of a function of your own; then training ends.",
    )
    memory_gib: float = Field(2.0, gt=0.0, description="Most memory (address space) of the process that runs the function.")

    @property
    def name(self) -> str:
        """The function or model as messages name it."""
        return self.function or f"model {self.model}"

    @field_validator("function")
    @classmethod
    def _is_known(cls, function: str | None) -> str | None:
        if function is None or function in _TEXT_FUNCTIONS or _PYTHON_FUNCTION.fullmatch(function):
            return function
        raise ValueError(f"it must be one of {', '.join(_TEXT_FUNCTIONS)} or python:MODULE:FUNCTION")

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.function is None) == (self.model is None):
            raise ValueError("a term of a reward names either a `function` or a `model`")
        if self.weight == 0:
            raise ValueError("a term with weight 0 is worth nothing; leave it out, or give it a weight")
        for function, key, value in (("regex", "pattern", self.pattern), ("json_schema", "json_schema", self.json_schema)):
            if (self.function == function) != (value is not None):
                raise ValueError(f"`{key}` belongs to function {function}, and only to it; this is {self.name}")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"the pattern is no regular expression of Python: {error}") from error
        return self


Reward = str | RewardTerm | tuple[RewardTerm, ...]


def reward_terms(reward: Reward | None) -> tuple[RewardTerm, ...]:
    """The terms of `reward`; the name of a model alone is one term of weight 1."""
    if reward is None:
        return ()
    if isinstance(reward, str):
        return (RewardTerm(model=reward),)
    return (reward,) if isinstance(reward, RewardTerm) else reward


def with_reward_model(reward: Reward, name: str) -> Reward:
    """`reward` with `name` in place of its reward model's."""
    if isinstance(reward, str):
        return name
    if isinstance(reward, RewardTerm):
        return reward.model_copy(update={"model": name}) if reward.model else reward
    return tuple(term.model_copy(update={"model": name}) if term.model else term for term in reward)
