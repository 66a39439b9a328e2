"""Unbatched decoding, for models that cannot compute several requests in one pass.

These are models with virtual tokens (prefix and prompt tuning) and some encoder-decoders. Each request is computed by the model's
own forward pass with a KV cache of its own, so concurrent requests save no time, and a reply does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from apprentice.errors import ModelError
from apprentice.inference.choices.seq2seq_scoring import is_seq2seq
from apprentice.inference.generation_request import GeneratedToken, GenerationRequest, RunningRequest, ScoredToken
from apprentice.inference.scheduler import PREFILL_TOKENS, Scheduler, scores


def has_virtual_tokens(model: Any) -> bool:
    """True for a model with prefix or prompt tuning, which puts trained virtual tokens before every text."""
    return _virtual_tokens(model) > 0


def _virtual_tokens(model: Any) -> int:
    configs = getattr(model, "peft_config", {}).values()
    return max((config.num_virtual_tokens for config in configs if config.is_prompt_learning), default=0)


@torch.inference_mode()
def alone_logprob(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """Natural log-probability of `ids` after `prompt`, summed over the tokens of `ids`, in a forward pass of its own."""
    wanted = torch.tensor(list(ids), device=_device(model))
    if is_seq2seq(model):
        start = model.config.decoder_start_token_id
        logits = model(input_ids=_row(model, prompt), decoder_input_ids=_row(model, [start, *ids[:-1]]), use_cache=False).logits[0]
    else:
        logits = model(input_ids=_row(model, [*prompt, *ids]), use_cache=False).logits[0][-len(ids) - 1 : -1]
    return float(logits.float().log_softmax(dim=-1).gather(1, wanted[:, None]).double().sum())


@dataclass
class _Memory:
    """KV cache of one request and, for an encoder-decoder, the encoder's output for the prompt."""

    cache: Any
    encoded: Any = None


class UnbatchedScheduler(Scheduler):
    """`Scheduler` that computes one request after another within each step.

    An encoder reads the prompt; with `score_from` it reads the tokens before that index, and the rest are forced on the decoder.
    Each request has a cache of its own, dropped at its end; `kv_bytes` is ignored.
    """

    def __init__(
        self, model: Any, *, slots: int, context: int, kv_bytes: int | None = None, prefill_tokens: int = PREFILL_TOKENS
    ) -> None:
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        most = min(context, positions - _virtual_tokens(model)) if positions else context
        self._fit(model, slots, most, None, 1)
        self._model = model
        # Once the virtual tokens are in the cache, the base model continues without them.
        self._behind = model.get_base_model() if has_virtual_tokens(model) else model
        self._memories: dict[Hashable, _Memory] = {}
        self._begin(prefill_tokens)

    def submit(self, key: Hashable, wanted: GenerationRequest) -> None:
        if wanted.score_from == 0 and is_seq2seq(self._model):
            raise ModelError("an encoder-decoder gives no probabilities to the prompt it reads; ask for those of the reply.")
        super().submit(key, wanted)

    def step(self) -> list[GeneratedToken]:
        """Admits waiting requests, runs a forward pass for each that holds a slot, and returns a token for each."""
        while self._waiting and (taken := self._slots.take(self._need(self._waiting[0][1]))) is not None:
            key, wanted = self._waiting.popleft()
            self._running[key] = RunningRequest(key, wanted, taken.slot, wanted.prompt)
        owners = list(self._running.values())
        return self._next_tokens(torch.stack([self._after(owner) for owner in owners]), owners) if owners else []

    @torch.inference_mode()
    def _after(self, owner: RunningRequest) -> Tensor:
        """Logits (vocabulary) after the last token of `owner`; the first call computes its prompt."""
        memory = self._memories.get(owner.key)
        if memory is None:
            return self._begin_pair(owner) if is_seq2seq(self._model) else self._begin_text(owner)
        ids = _row(self._model, owner.pending)
        if memory.encoded is None:
            found = self._behind(input_ids=ids, past_key_values=memory.cache, use_cache=True)
        else:
            given = {"encoder_outputs": memory.encoded, "decoder_input_ids": ids}
            found = self._behind(**given, past_key_values=memory.cache, use_cache=True)
        memory.cache = found.past_key_values
        owner.start += len(owner.pending)
        last: Tensor = found.logits[0, -1]
        return last

    def _begin_text(self, owner: RunningRequest) -> Tensor:
        prompt, first = owner.wanted.prompt, owner.wanted.score_from
        found = self._model(input_ids=_row(self._model, prompt), use_cache=True)
        self._memories[owner.key] = _Memory(found.past_key_values)
        owner.start = len(prompt)
        if first is not None:
            owner.prompt = [ScoredToken(prompt[0], None)] if first == 0 else []
            begin = max(first, 1)
            logits = found.logits[0][-len(prompt) :][begin - 1 : -1]
            owner.prompt += scores(logits, prompt[begin:], [owner.wanted.logprobs or 0] * len(prompt[begin:]))
        last: Tensor = found.logits[0, -1]
        return last

    def _begin_pair(self, owner: RunningRequest) -> Tensor:
        prompt, first = owner.wanted.prompt, owner.wanted.score_from
        told = prompt[first:] if first is not None else ()
        start = self._model.config.decoder_start_token_id
        given = {"input_ids": _row(self._model, prompt[: len(prompt) - len(told)])}
        found = self._model(**given, decoder_input_ids=_row(self._model, [start, *told]), use_cache=True)
        states = BaseModelOutput(last_hidden_state=found.encoder_last_hidden_state)
        self._memories[owner.key] = _Memory(found.past_key_values, states)
        owner.start = 1 + len(told)
        if told:
            owner.prompt = scores(found.logits[0, :-1], told, [owner.wanted.logprobs or 0] * len(told))
        last: Tensor = found.logits[0, -1]
        return last

    def _release(self, owner: RunningRequest) -> None:
        self._memories.pop(owner.key, None)
        super()._release(owner)


def _device(model: Any) -> torch.device:
    found: torch.device = next(model.parameters()).device
    return found


def _row(model: Any, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=_device(model))
