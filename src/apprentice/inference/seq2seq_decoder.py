"""Continuous batching for encoder-decoders: the encoder reads each prompt once; requests join and leave between two steps.

`Seq2seqScheduler` takes its queue, sampling and stopping from `Scheduler`. If the end of a prompt is to be scored (`score_from`),
the encoder reads the tokens before that index, and the rest are forced as the first tokens of the decoder.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from apprentice.errors import ModelError
from apprentice.inference.encoder_decoder import CrossingDecoder, Part, check
from apprentice.inference.generation_request import GeneratedToken, GenerationRequest, RunningRequest
from apprentice.inference.lora import Lora
from apprentice.inference.scheduler import PREFILL_TOKENS, Scheduler, scores


class Seq2seqScheduler(Scheduler):
    """Continuous-batching decoder of up to `slots` concurrent requests of an encoder-decoder.

    A prompt must be shorter than `context` tokens, and a reply ends when the decoder has `context`; `context` is cut to the model's
    `max_position_embeddings`. `kv_bytes` limits memory as in `Scheduler`. Not thread-safe. Raises `CannotShareError` for a model
    that cannot be batched, and `ModelError` for one whose logits are not finite or for too little memory.
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

    def submit(self, key: Hashable, wanted: GenerationRequest) -> None:
        if wanted.score_from == 0:
            raise ModelError("an encoder-decoder gives no probabilities to the prompt it reads; ask for those of the reply.")
        super().submit(key, wanted)

    def step(self) -> list[GeneratedToken]:
        """Admits waiting requests, runs one pass over all, and returns a token for each. Empty if there are no requests."""
        self._join()
        owners = sorted(self._running.values(), key=lambda owner: owner.slot)
        if not owners:
            return []
        parts = [Part(owner.slot, owner.start, owner.pending, self._unread(owner), owner.wanted.adapter) for owner in owners]
        logits = self._crossing.forward(parts)
        row = 0
        rows: list[int] = []  # of the logits after the last token of each request
        for owner, part in zip(owners, parts, strict=True):
            if said := part.ids[1:]:
                owner.prompt += scores(logits[row : row + len(said)], said, [owner.wanted.logprobs or 0] * len(said))
            owner.start += len(part.ids)
            row += len(part.ids)
            rows.append(row - 1)
        return self._next_tokens(logits if len(rows) == len(logits) else logits[rows], owners)

    def _join(self) -> None:
        """Admits waiting requests, up to `prefill_tokens` of prompts in one step; the first prompt may have any length."""
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
            self._running[key] = RunningRequest(key, wanted, taken.slot, (self._start_id, *said))

    def _unread(self, owner: RunningRequest) -> Sequence[int]:
        """Tokens that the encoder has to read in this step: the prompt of a request in its first step, else none."""
        return () if owner.start else owner.wanted.prompt[: _parted(owner.wanted)]


def _parted(wanted: GenerationRequest) -> int:
    """Number of prompt tokens that the encoder reads; the decoder is forced through the rest."""
    return len(wanted.prompt) if wanted.score_from is None else wanted.score_from
