"""Continuous batching for encoder-decoders: the encoder reads each prompt once, requests join and leave between two steps.

The same core as `Decoder`, of which it takes queue, sampling and the end of a reply. Where a prompt's end is to be scored
(`score_from`), the encoder reads what is before, and the decoder is made to say the rest.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from apprentice.errors import ModelError
from apprentice.models.crossing import CrossingDecoder, check
from apprentice.models.decoding import PREFILL_TOKENS, Decoder, Generation, Running, Token, scores


class Seq2seqDecoder(Decoder):
    """Decodes up to `slots` requests together, prompt and reply of up to `context` tokens together.

    `context` shrinks to what the model's positions allow; `kv_bytes` bounds the keys and values of both sides, as in `Decoder`.
    Not thread-safe. Raises `ModelError` for a model that cannot be decoded so.
    """

    def __init__(
        self, model: Any, *, slots: int, context: int, kv_bytes: int | None = None, prefill_tokens: int = PREFILL_TOKENS
    ) -> None:
        of_one = check(model)
        positions = getattr(model.config, "max_position_embeddings", None)
        self._fit(model, slots, min(context, positions or context), kv_bytes, of_one)
        self._start_id = int(model.config.decoder_start_token_id)
        self._crossing = CrossingDecoder(model, self.slots, self.context)
        self._begin(prefill_tokens)

    @property
    def held_tokens(self) -> int:
        return sum(owner.start + len(owner.wanted.prompt) for owner in self._running.values())

    def submit(self, key: Hashable, wanted: Generation) -> None:
        if wanted.score_from == 0:
            raise ModelError("an encoder-decoder gives no probabilities to the prompt it reads; ask for those of the reply.")
        super().submit(key, wanted)

    def step(self) -> list[Token]:
        """Prompts are read, within what one step may read; then one token more for everybody who was here before."""
        running = sorted(self._running.values(), key=lambda owner: owner.slot)
        rows: list[Tensor] = []
        if running:
            logits = self._crossing.step(
                [owner.slot for owner in running],
                [owner.start for owner in running],
                [owner.pending[0] for owner in running],
                [owner.wanted.adapter for owner in running],
            )
            rows.append(logits)
            for owner in running:
                owner.start += 1
        joined: list[Running] = []
        room = self._prefill_tokens
        while self._waiting and (not joined or len(self._waiting[0][1].prompt) <= room):
            if (taken := self._slots.take(self._need(self._waiting[0][1]))) is None:
                break
            for emptied in taken.emptied:
                self._crossing.give_back(emptied)
            key, wanted = self._waiting.popleft()
            room -= len(wanted.prompt)
            owner, last = self._read(key, wanted, taken.slot)
            joined.append(owner)
            rows.append(last[None])
        return self._next_tokens(torch.cat(rows), [*running, *joined]) if rows else []

    def _read(self, key: Hashable, wanted: Generation, slot: int) -> tuple[Running, Tensor]:
        """The new request in its slot, and the logits (vocabulary) of its first new token."""
        parted = len(wanted.prompt) if wanted.score_from is None else wanted.score_from
        prompt, said = wanted.prompt[:parted], wanted.prompt[parted:]
        logits = self._crossing.read(slot, prompt, [self._start_id, *said], wanted.adapter)
        owner = self._running[key] = Running(key, wanted, slot, (), start=1 + len(said))
        if said:
            owner.prompt += scores(logits[:-1], said, [wanted.logprobs or 0] * len(said))
        return owner, logits[-1]
