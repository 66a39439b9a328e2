"""What every block of a recipe shares: unknown keys are refused and values never change."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Strict(BaseModel):
    """A block of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)
