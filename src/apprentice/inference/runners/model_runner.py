"""Protocol of model runners: one pass of a model over the requests that run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from apprentice.inference.generation_request import GenerationRequest, SplitPrompt
from apprentice.inference.kv_cache import KvCacheSize
from apprentice.inference.kv_slots import SlotAllocation
from apprentice.inference.lora import Lora
from apprentice.inference.running_request import RunningRequest


class ModelRunner(Protocol):
    """A model with the keys and values of its requests. The scheduler decides which tokens `run` computes."""

    size: KvCacheSize
    vocabulary: int  # number of token ids, from 0 on, that have both an input embedding and a logit
    splits_prompts: bool  # whether a prompt may be computed in several passes, or continue another prompt's keys and values

    def split_prompt(self, request: GenerationRequest) -> SplitPrompt:
        """The request's prompt as the model reads it. Raises `ModelError` for a request that it cannot compute."""

    def begin(self, allocation: SlotAllocation) -> None:
        """Frees and copies the keys and values that a new request's slot asks for."""

    def run(self, batch: Sequence[RunningRequest]) -> Tensor:
        """Computes the scheduled tokens of `batch`; returns each request's `logit_rows` in turn, (rows, vocabulary)."""

    def end(self, slot: int) -> None:
        """The request in `slot` has ended or was cancelled."""

    def try_adapter(self, adapter: Lora) -> None:
        """Runs one pass over two short requests, one with `adapter`, in a cache of its own. Raises what the pass raises."""


def count_token_ids(model: Any) -> int:
    """Number of token ids, from 0 on, that have both an input embedding and a logit."""
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    return min(len(layer.weight) for layer in layers if layer is not None)
