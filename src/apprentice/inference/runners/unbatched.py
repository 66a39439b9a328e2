"""Runner of models that cannot compute several requests in one pass: each request has a forward pass and a cache of its own.

These are models with virtual tokens (prefix and prompt tuning) and some encoder-decoders. Concurrent requests save no time, and a
reply does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from apprentice.errors import ModelError
from apprentice.inference.generation_request import GenerationRequest, SplitPrompt
from apprentice.inference.kv_cache import KvCacheSize
from apprentice.inference.kv_slots import SlotAllocation
from apprentice.inference.lora import Lora
from apprentice.inference.runners.encoder_decoder import split_prompt
from apprentice.inference.runners.model_runner import count_token_ids
from apprentice.inference.running_request import RunningRequest
from apprentice.models.model_kind import count_virtual_tokens, has_virtual_tokens, is_encoder_decoder


@dataclass
class _RequestCache:
    """transformers' KV cache of one request and, for an encoder-decoder, the encoder's output for the prompt."""

    past: Any
    encoded: BaseModelOutput | None = None


class UnbatchedRunner:
    """`ModelRunner` that computes one request after another within each pass.

    An encoder reads the prompt; with `score_from` it reads the tokens before that index, and the rest are forced on the decoder.
    A request's cache is dropped at its end, and no limit in bytes holds.
    """

    splits_prompts = False

    def __init__(self, model: Any, *, slots: int, context: int) -> None:
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        most = min(context, positions - count_virtual_tokens(model)) if positions else context
        self._is_encoder_decoder = is_encoder_decoder(model)
        sides = 2 if self._is_encoder_decoder else 1
        self.size = KvCacheSize.within(None, 1, slots=slots, context=most, on_cpu=True, sides=sides)
        self.vocabulary = count_token_ids(model)
        self._model = model
        # Once the virtual tokens are in the cache, the base model continues without them.
        self._base = model.get_base_model() if has_virtual_tokens(model) else model
        self._caches: dict[int, _RequestCache] = {}  # by slot

    def split_prompt(self, request: GenerationRequest) -> SplitPrompt:
        """As the runners of causal models and encoder-decoders split it."""
        if self._is_encoder_decoder:
            return split_prompt(request, self._model.config.decoder_start_token_id)
        return SplitPrompt((), request.prompt, request.score_from)

    def begin(self, allocation: SlotAllocation) -> None:
        """A request's cache is made in its first pass."""

    @torch.inference_mode()
    def run(self, batch: Sequence[RunningRequest]) -> Tensor:
        """A forward pass for each request in turn."""
        return torch.cat([self._compute_logits(running)[-running.logit_rows :] for running in batch])

    def end(self, slot: int) -> None:
        """Drops the request's cache."""
        self._caches.pop(slot, None)

    def try_adapter(self, adapter: Lora) -> None:
        """Raises `ModelError`: no adapters can be applied here."""
        raise ModelError("a model that computes each request in a pass of its own takes no adapters.")

    def _compute_logits(self, running: RunningRequest) -> Tensor:
        """Logits (tokens, vocabulary) after the scheduled tokens of one request; its first pass computes the virtual tokens too."""
        ids = self._row(running.scheduled_ids)
        cache = self._caches.get(running.slot)
        inputs: dict[str, Any]
        if self._is_encoder_decoder:
            inputs = {"decoder_input_ids": ids}
            inputs |= {"input_ids": self._row(running.prompt.encoder_ids)} if cache is None else {"encoder_outputs": cache.encoded}
        else:
            inputs = {"input_ids": ids}
        if cache is None:
            output = self._model(**inputs, use_cache=True)
            encoded = BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state) if self._is_encoder_decoder else None
            self._caches[running.slot] = _RequestCache(output.past_key_values, encoded)
        else:
            output = self._base(**inputs, past_key_values=cache.past, use_cache=True)
            cache.past = output.past_key_values
        logits: Tensor = output.logits[0]
        return logits

    def _row(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=next(self._model.parameters()).device)
