"""Continuous batching: many requests share every decoding step, join between two steps, and leave the moment they are done.

`Decoder` is the plain core: submit, cancel, step; no threads, no Ray, no HTTP, and token ids only. `generate` drives it for a list
of prompts. A reply does not depend on the company it was made in: attention is the same arithmetic everywhere (ragged.py), and
each request samples from its own stream of numbers. What remains is the rounding of a matrix product that sums in another order
for few rows than for many: in fp32 far below the distance of two logits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from apprentice.errors import ModelError
from apprentice.models.ragged import KvMemory, Segment, forward, prepare
from apprentice.models.sampling import GREEDY, Sampling, draw

Finish = Literal["stop", "length"]
# Prompt tokens computed in one step: enough to fill the cores, few enough that running requests do not notice.
PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Generation:
    """What one request asks for. It ends at one of `stop_ids`, or after `max_new_tokens`, or where the context is full."""

    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: Collection[int] = ()
    sampling: Sampling = GREEDY


class Token(NamedTuple):
    """One new token of the request `key`; `finish` says why it is the last, or is None. A stop id is reported too."""

    key: Hashable
    id: int
    finish: Finish | None


@dataclass
class _Running:
    key: Hashable
    wanted: Generation
    slot: int
    pending: Sequence[int]  # tokens whose keys and values are not in memory yet
    start: int = 0  # position of the first of them
    produced: int = field(default=0)


class Decoder:
    """Decodes up to `slots` requests together, each with up to `context` tokens of prompt and reply.

    `context` shrinks to what the model's positions allow. Not thread-safe. Raises `ModelError` for a model that cannot be
    decoded so.
    """

    def __init__(self, model: Any, *, slots: int, context: int, prefill_tokens: int = PREFILL_TOKENS) -> None:
        prepare(model)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.context = min(context, positions) if positions else context
        self._model = model
        self._memory = KvMemory(slots, self.context)
        self._prefill_tokens = prefill_tokens
        self._free = list(range(slots))
        self._waiting: deque[tuple[Hashable, Generation]] = deque()
        self._running: dict[Hashable, _Running] = {}

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    def submit(self, key: Hashable, wanted: Generation) -> None:
        """Queues a request under a new `key`. Raises `ModelError` where prompt and one token do not fit the context."""
        if not wanted.prompt:
            raise ModelError("the prompt is empty; give at least one token.")
        if len(wanted.prompt) >= self.context:
            raise ModelError(
                f"the prompt has {len(wanted.prompt)} tokens; the context of {self.context} leaves no room for a reply."
            )
        self._waiting.append((key, wanted))

    def cancel(self, key: Hashable) -> None:
        """Forgets the request; its slot is free for the next step. An unknown key is one that has just ended."""
        if key in self._running:
            self._release(self._running[key])
        else:
            self._waiting = deque(item for item in self._waiting if item[0] != key)

    def step(self) -> list[Token]:
        """One forward pass for all: a token for every request whose prompt is computed. Empty if nobody is here."""
        self._admit()
        segments, owners = self._segments()
        if not segments:
            return []
        logits = forward(self._model, self._memory, segments)
        best = logits.argmax(dim=-1).tolist()
        tokens = []
        for number, (segment, owner) in enumerate(zip(segments, owners, strict=True)):
            owner.start += len(segment.ids)
            owner.pending = owner.pending[len(segment.ids) :]
            if not owner.pending:
                sampling = owner.wanted.sampling
                chosen = best[number] if sampling.is_greedy else draw(logits[number], sampling, owner.produced)
                tokens.append(self._accept(owner, chosen))
        return tokens

    def _admit(self) -> None:
        while self._waiting and self._free:
            key, wanted = self._waiting.popleft()
            # The lowest slot, so that those in use stay adjacent and are read as one view.
            slot = self._free.pop(self._free.index(min(self._free)))
            self._running[key] = _Running(key, wanted, slot, wanted.prompt)

    def _segments(self) -> tuple[list[Segment], list[_Running]]:
        room = self._prefill_tokens
        segments, owners = [], []
        for owner in self._running.values():  # oldest first
            ids = owner.pending[: self._prefill_tokens]
            if not owner.produced:
                # A prompt is cut at its own multiples, whatever else there is, so that its arithmetic is always the same.
                if len(ids) > room:
                    continue
                room -= len(ids)
            segments.append(Segment(owner.slot, owner.start, ids))
            owners.append(owner)
        return segments, owners

    def _accept(self, owner: _Running, chosen: int) -> Token:
        owner.produced += 1
        owner.pending = [chosen]
        finish: Finish | None = None
        if chosen in owner.wanted.stop_ids:
            finish = "stop"
        elif owner.produced >= owner.wanted.max_new_tokens or owner.start >= self.context:
            finish = "length"
        if finish:
            self._release(owner)
        return Token(owner.key, chosen, finish)

    def _release(self, owner: _Running) -> None:
        del self._running[owner.key]
        self._free.append(owner.slot)


def generate(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Collection[int], max_running: int = 32
) -> list[list[int]]:
    """Greedy replies to `prompts` (token ids), in their order, without the stop id that ended them."""
    if not prompts:
        return []
    context = max(len(prompt) for prompt in prompts) + max_new_tokens
    decoder = Decoder(model, slots=min(max_running, len(prompts)), context=context)
    # Prompts of like length run side by side, so that little is padded in attention.
    for number in sorted(range(len(prompts)), key=lambda number: len(prompts[number])):
        decoder.submit(number, Generation(prompts[number], max_new_tokens, frozenset(stop_ids)))
    replies: dict[Hashable, list[int]] = {number: [] for number in range(len(prompts))}
    while decoder.running or decoder.waiting:
        for token in decoder.step():
            if token.finish != "stop":
                replies[token.key].append(token.id)
    return list(replies.values())
