"""RunNotes: what people note on a run on the board, in `board.json` of the run folder. It is no part of the run's identity."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from apprentice.run.folder import Run

FILE = "board.json"
Tag = Annotated[str, Field(min_length=1, max_length=60)]


class RunNotes(BaseModel):
    """Tags of a run, and whether it is archived: left out of the list unless asked for."""

    model_config = ConfigDict(extra="ignore")
    version: int = 1
    tags: list[Tag] = Field(default_factory=list, max_length=50)
    archived: bool = False

    @classmethod
    def of(cls, run: Run) -> RunNotes:
        """The notes on `run`; empty ones where nobody has made any."""
        file = run.folder / FILE
        return cls.model_validate(file.read_json()) if file.exists() else cls()

    def save(self, run: Run) -> None:
        """Writes the notes into the run folder."""
        (run.folder / FILE).write_json(self.model_dump())
