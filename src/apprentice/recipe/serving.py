"""The recipe's `serving` block: the endpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from apprentice.recipe.strict import Positive, Strict


class Replicas(Strict):
    """How many copies of the engine run."""

    min: Positive = 1
    max: Positive = 1


class Serving(Strict):
    """The endpoint over the trained model."""

    engine: Literal["auto", "transformers"] = "auto"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    replicas: Replicas = Replicas()
    max_running: Positive = Field(32, description="Requests decoded together by one replica.")
    max_queued_requests: Positive = 64
    context: Positive = Field(2048, description="Tokens of prompt and reply together.")
