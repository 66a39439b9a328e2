"""Schemas of the bodies that are no generated text: lists of models and tasks, answers to tasks, rendered prompts, health.

As in `responses`, a field that was not set is left out, and the fields' order is the bodies'.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from apprentice.serve.api.schemas.responses import ResponseBody


class ModelDescription(ResponseBody):
    """A served model, in OpenAI's shape; an adapter has its base as `parent`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["apprentice"]
    parent: str = ""


class ModelList(ResponseBody):
    """All models that a key may use."""

    object: Literal["list"]
    data: list[ModelDescription]


class TaskDescription(ResponseBody):
    """A task: its fields, a sample row, its choices where they are the same for each row, and the names of its templates."""

    id: str
    object: Literal["task"]
    cluster: str
    summary: str
    fields: list[str]
    sample: dict[str, Any] | None
    choices: list[str] | None
    templates: list[str]


class TaskList(ResponseBody):
    """All tasks that can be asked by their fields."""

    object: Literal["list"]
    data: list[TaskDescription]


class RankedChoice(ResponseBody):
    """A choice with its probability among all of them, and its summed log-probability."""

    choice: str
    probability: float
    logprob: float


class TaskAnswer(ResponseBody):
    """The answer to a row of a task: a generated reply, or the best of its choices, with the rule that ranked them."""

    object: Literal["task.answer"]
    task: str
    template: str
    instruction: str
    input: str
    prompt: str
    answer: str
    ranked_by: str = ""
    choices: list[RankedChoice] = Field([])


class RenderedPrompt(ResponseBody):
    """A prompt as the model reads it; of a task's row, also what was rendered, and its choices."""

    text: str
    token_ids: list[int]
    instruction: str = ""
    input: str = ""
    choices: list[str] = Field([])


class Health(ResponseBody):
    """The endpoint's first model; there is a body only while all engines run."""

    status: Literal["ok"]
    model: str
    layout: str
    context: int


class Readiness(ResponseBody):
    """Every engine has produced a token."""

    status: Literal["ready"]
