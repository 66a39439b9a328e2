"""The prompt contract `apprentice.json` that lies beside a model's weights: its schema, reading it, and the hash of the weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apprentice.errors import ContractError
from apprentice.run.identity import ADAPTER, CONTRACT_FILE, without_place
from apprentice.storage import Folder


class GoldenPrompt(BaseModel):
    """A golden prompt: instruction and input, behind earlier (question, answer) turns, and the token ids it must have."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    instruction: str
    input: str
    ids: tuple[int, ...]
    history: tuple[tuple[str, str], ...] = ()


class GoldenConversation(BaseModel):
    """A golden conversation with functions: messages and tools as JSON texts in OpenAI's form, and the ids of its prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    messages: tuple[str, ...]
    tools: tuple[str, ...]
    ids: tuple[int, ...]


class PromptContract(BaseModel):
    """The prompt contract, `apprentice.json`: everything needed to encode a request with the token ids of training.

    Training writes it. Evaluation and serving follow it, and refuse a model whose golden prompts they cannot reproduce.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int = 1
    layout: str
    layout_version: int
    system: str
    date: str = Field(description="Frozen date for chat templates that insert one.")
    control_tokens: tuple[str, ...] = Field(
        (), description="Control tokens that texts may hold as such; all others are text there."
    )
    max_length: int = Field(description="Tokens of one training example.")
    truncation: str = "exemplars from the last, then input from its end; instruction and answer never"
    end_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    reasoning: Literal["train", "mask", "drop"] | None = Field(
        None, description="data.reasoning; with train and mask, prompts leave a thought to the reply."
    )
    rank_by: Literal["sum", "mean", "pmi"] = Field("sum", description="How the choices of a task are compared.")
    tokenizer_sha256: str
    chat_template_sha256: str | None
    chat_template: str | None = Field(None, description="Of a bare model that a recipe gives one; else it lies beside the weights.")
    base: str
    base_sha256: str | None = Field(None, description="Of an adapter's base: its weight files.")
    weights_sha256: str = Field(
        description="Of the weight files beside the contract, in order of name; empty at an endpoint that did not take it."
    )
    ancestors: tuple[str, ...] = Field((), description="Base models and runs this one comes from, oldest first.")
    run: str = ""
    golden: tuple[GoldenPrompt, ...]
    golden_tools: GoldenConversation | None = Field(None, description="None where the chat template cannot show functions.")

    def for_other_weights(self) -> PromptContract:
        """The same contract for other weights that have none of their own, without hashes of weights."""
        return self.model_copy(update={"weights_sha256": "", "base_sha256": None})

    def without_places(self) -> PromptContract:
        """The same contract for other people: bases by their names, without paths and URIs."""
        return self.model_copy(update={"base": without_place(self.base), "ancestors": tuple(map(without_place, self.ancestors))})

    def write(self, folder: Path) -> None:
        """Writes the contract into the model folder `folder`."""
        (Folder.at(folder) / CONTRACT_FILE).write_text(self.model_dump_json(indent=2) + "\n")


def read_contract(folder: Path | Folder) -> PromptContract | None:
    """The contract in a model folder; None if there is none. Raises `ContractError` if it does not fit the schema."""
    file = Folder.at(str(folder)) / CONTRACT_FILE
    if not file.exists():
        return None
    try:
        return PromptContract.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise ContractError(f"{file} is not a prompt contract of this version: {error.errors()[0]['msg']}.") from error


def weights_sha256(folder: Path) -> str:
    """sha256 over the safetensors files of `folder`, in order of name; over `.bin` files where there are none.

    An adapter beside the weights (`adapter/`) is included, because two runs of one base may differ in nothing else.
    """
    digest = hashlib.sha256()
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for file in [*weights, *sorted((folder / ADAPTER).glob("*.safetensors"))]:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
