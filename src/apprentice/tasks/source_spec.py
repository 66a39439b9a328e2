"""The source of a task's rows: one entry of a task file's `sources`."""

from __future__ import annotations

import codecs
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class TaskFileModel(BaseModel):
    """Base of the parts of a task file: frozen, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceSpec(TaskFileModel):
    """The source of a task's rows. Exactly one of `dataset`, `hub`, `files` and `builtin` is set."""

    dataset: str | None = Field(None, description="Folder under `data.root` with one Parquet file per split.")
    hub: str | None = Field(None, description="Dataset id on the Hugging Face hub.")
    config: str | None = Field(None, description="Configuration of the hub dataset.")
    revision: str | None = Field(None, description="Commit of the hub dataset; empty when unknown.")
    encoding: str | None = Field(None, description="Of CSV, JSON and columns of bytes, such as cp1252; UTF-8 when empty.")
    files: dict[str, str] | None = Field(None, description="Split → path (Parquet, JSONL or CSV), relative to the task file.")
    builtin: str | None = Field(None, description="Name of a generator in `apprentice.tasks.builtin`.")
    splits: dict[Literal["train", "test"], str] = Field({"train": "train", "test": "test"}, description="Our split → the source's.")
    columns: dict[str, str] = Field({}, description="Our field → the source's column, where the names differ.")
    rows: dict[Literal["train", "test"], int] = Field({}, description="Published number of rows; empty when unknown.")
    card: str | None = Field(None, description="Where splits, columns and rows were looked up.")

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        return name and known_encoding(name)

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        places = [self.dataset, self.hub, self.files, self.builtin]
        if sum(place is not None for place in places) != 1:
            raise ValueError("a source names exactly one of `dataset`, `hub`, `files` and `builtin`")
        return self


def known_encoding(name: str) -> str:
    """Python's name of a text encoding. Raises `ValueError` for an unknown one."""
    try:
        "".encode(name)  # fails for codecs that do not encode text, such as hex
        return codecs.lookup(name).name
    except LookupError as error:
        raise ValueError(f"no encoding is called {name!r}; give one such as utf-8, cp1252 or shift_jis") from error
