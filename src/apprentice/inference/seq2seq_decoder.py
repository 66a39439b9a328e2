"""Continuous batching for encoder-decoders: the encoder reads each prompt once, requests join and leave between two steps.

The same core as `Decoder`, of which it takes queue, sampling and the end of a reply. Where a prompt's end is to be scored
(`score_from`), the encoder reads what is before, and the decoder is made to say the rest.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from apprentice.errors import ModelError
from apprentice.inference.decoder import PREFILL_TOKENS, Decoder, Generation, Running, Token, scores
from apprentice.inference.encoder_decoder import CrossingDecoder, Part, check
from apprentice.inference.lora import Lora


class Seq2seqDecoder(Decoder):
    """Decodes up to `slots` requests together, prompt and reply of up to `context` tokens together.

    `context` shrinks to what the model's positions allow; `kv_bytes` bounds the keys and values of both sides, as in `Decoder`.
    Not thread-safe. Raises `ModelError` for a model that cannot be decoded so.
    """

    def __init__(
        self, model: Any, *, slots: int, context: int, kv_bytes: int | None = None, prefill_tokens: int = PREFILL_TOKENS
    ) -> None:
        tried = check(model)
        positions = getattr(model.config, "max_position_embeddings", None)
        of_one = tried.memory(crosses=False).position_bytes
        self._fit(model, slots, min(context, positions or context), kv_bytes, of_one)
        self._start_id = int(model.config.decoder_start_token_id)
        self._crossing = CrossingDecoder(model, self.slots, self.context)
        self._crossing.allocate(tried)
        self._begin(prefill_tokens)

    @property
    def held_tokens(self) -> int:
        return sum(owner.start + len(owner.wanted.prompt) for owner in self._running.values())

    def try_adapter(self, adapter: Lora) -> None:
        self._crossing.try_adapter(adapter)

    def submit(self, key: Hashable, wanted: Generation) -> None:
        if wanted.score_from == 0:
            raise ModelError("an encoder-decoder gives no probabilities to the prompt it reads; ask for those of the reply.")
        super().submit(key, wanted)

    def step(self) -> list[Token]:
        """One pass for all: what may be read of waiting prompts is read, and everybody gets a token."""
        self._join()
        owners = sorted(self._running.values(), key=lambda owner: owner.slot)
        if not owners:
            return []
        parts = [Part(owner.slot, owner.start, owner.pending, self._unread(owner), owner.wanted.adapter) for owner in owners]
        logits = self._crossing.forward(parts)
        row = 0
        rows: list[int] = []  # of the logits after each one's last token
        for owner, part in zip(owners, parts, strict=True):
            if said := part.ids[1:]:
                owner.prompt += scores(logits[row : row + len(said)], said, [owner.wanted.logprobs or 0] * len(said))
            owner.start += len(part.ids)
            row += len(part.ids)
            rows.append(row - 1)
        return self._next_tokens(logits if len(rows) == len(logits) else logits[rows], owners)

    def _join(self) -> None:
        """Gives slots to those who wait, as many as one step may read; the first in the queue may have any length."""
        read = 0
        while self._waiting:
            key, wanted = self._waiting[0]
            if read and read + len(wanted.prompt) > self._prefill_tokens:
                return
            if (taken := self._slots.take(self._need(wanted))) is None:
                return
            read += len(wanted.prompt)
            for emptied in taken.emptied:
                self._crossing.give_back(emptied)
            self._waiting.popleft()
            said = wanted.prompt[_parted(wanted) :]
            self._running[key] = Running(key, wanted, taken.slot, (self._start_id, *said))

    def _unread(self, owner: Running) -> Sequence[int]:
        """What the encoder is to read now: the prompt of a request that has just come."""
        return () if owner.start else owner.wanted.prompt[: _parted(owner.wanted)]


def _parted(wanted: Generation) -> int:
    """How much of the prompt the encoder reads; the decoder is made to say the rest."""
    return len(wanted.prompt) if wanted.score_from is None else wanted.score_from
