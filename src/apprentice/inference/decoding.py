"""Decoding of any model: the scheduler with the runner of its kind, and greedy replies to a list of prompts."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from apprentice.inference.generation_request import GenerationRequest, NotFiniteError
from apprentice.inference.runners.causal import CausalRunner
from apprentice.inference.runners.encoder_decoder import EncoderDecoderRunner
from apprentice.inference.runners.encoder_decoder_attention import CannotBatchError
from apprentice.inference.runners.model_runner import ModelRunner
from apprentice.inference.runners.unbatched import UnbatchedRunner
from apprentice.inference.scheduler import PREFILL_TOKENS, Scheduler
from apprentice.models.model_kind import has_virtual_tokens, is_encoder_decoder


def make_scheduler(
    model: Any,
    *,
    slots: int,
    context: int,
    kv_bytes: int | None = None,
    prefill_tokens: int = PREFILL_TOKENS,
    allow_unbatched: bool = False,
) -> Scheduler:
    """Makes the scheduler of `model` for up to `slots` concurrent requests, each of up to `context` tokens.

    `context` is cut to what the model has positions for. Keys and values take at most `kv_bytes` (None: as much as all slots need).
    Raises `ModelError` for a model that cannot be decoded, or for too little memory. With `allow_unbatched`, an encoder-decoder
    that cannot be batched computes its requests one by one; else it raises `CannotBatchError`.
    """
    runner: ModelRunner
    if has_virtual_tokens(model):
        runner = UnbatchedRunner(model, slots=slots, context=context)
    elif is_encoder_decoder(model):
        try:
            runner = EncoderDecoderRunner(model, slots=slots, context=context, kv_bytes=kv_bytes)
        except CannotBatchError:
            if not allow_unbatched:
                raise
            runner = UnbatchedRunner(model, slots=slots, context=context)
    else:
        runner = CausalRunner(model, slots=slots, context=context, kv_bytes=kv_bytes)
    return Scheduler(runner, prefill_tokens=prefill_tokens)


def generate(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Collection[int], max_running: int = 32
) -> list[list[int]]:
    """Generates greedy replies to `prompts` (token ids), in their order, without the stop id that ended them.

    Raises `NotFiniteError`, and `ModelError` for a prompt or model that cannot be decoded.
    """
    if not prompts:
        return []
    context = max(len(prompt) for prompt in prompts) + max_new_tokens
    scheduler = make_scheduler(model, slots=min(max_running, len(prompts)), context=context, allow_unbatched=True)
    # Prompts of similar length run side by side, so that they fall into the same length buckets.
    for number in sorted(range(len(prompts)), key=lambda number: len(prompts[number])):
        scheduler.submit(number, GenerationRequest(prompts[number], max_new_tokens, frozenset(stop_ids), logprobs=0))
    replies: dict[int, list[int]] = {number: [] for number in range(len(prompts))}
    while scheduler.running or scheduler.waiting:
        for token in scheduler.step():
            assert isinstance(token.key, int)
            if token.score is None or token.score.logprob is None or not math.isfinite(token.score.logprob):
                raise NotFiniteError(token.key)
            if token.finish != "stop":
                replies[token.key].append(token.id)
    return list(replies.values())
