"""Decoding of any model: the scheduler for its kind, and greedy replies to a list of prompts."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from apprentice.inference.choices.seq2seq_scoring import is_seq2seq
from apprentice.inference.encoder_decoder import CannotShareError
from apprentice.inference.generation_request import GenerationRequest, NotFiniteError
from apprentice.inference.scheduler import Scheduler
from apprentice.inference.seq2seq_decoder import Seq2seqScheduler
from apprentice.inference.unbatched import UnbatchedScheduler, has_virtual_tokens


def make_scheduler(model: Any, *, slots: int, context: int, kv_bytes: int | None = None, or_alone: bool = False) -> Scheduler:
    """Makes the scheduler for the kind of `model`. Raises `ModelError` as `Scheduler` does.

    With `or_alone`, an encoder-decoder that cannot be batched gets an `UnbatchedScheduler`; else it raises `CannotShareError`.
    """
    kind = UnbatchedScheduler if has_virtual_tokens(model) else Seq2seqScheduler if is_seq2seq(model) else Scheduler
    try:
        return kind(model, slots=slots, context=context, kv_bytes=kv_bytes)
    except CannotShareError:
        if not or_alone:
            raise
        return UnbatchedScheduler(model, slots=slots, context=context)


def generate(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Collection[int], max_running: int = 32
) -> list[list[int]]:
    """Generates greedy replies to `prompts` (token ids), in their order, without the stop id that ended them.

    Raises `NotFiniteError`, and `ModelError` for a prompt or model that cannot be decoded.
    """
    if not prompts:
        return []
    context = max(len(prompt) for prompt in prompts) + max_new_tokens
    scheduler = make_scheduler(model, slots=min(max_running, len(prompts)), context=context, or_alone=True)
    # Prompts of similar length run side by side, so that they fall into the same length buckets.
    for number in sorted(range(len(prompts)), key=lambda number: len(prompts[number])):
        scheduler.submit(number, GenerationRequest(prompts[number], max_new_tokens, frozenset(stop_ids), logprobs=0))
    replies: dict[int, list[int]] = {number: [] for number in range(len(prompts))}
    while scheduler.running or scheduler.waiting:
        for token in scheduler.step():
            assert isinstance(token.key, int)
            if token.scored is None or token.scored.logprob is None or not math.isfinite(token.scored.logprob):
                raise NotFiniteError(token.key)
            if token.finish != "stop":
                replies[token.key].append(token.id)
    return list(replies.values())
