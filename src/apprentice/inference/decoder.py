"""Continuous batching: many requests share every decoding step, join between two steps, and leave the moment they are done.

`Decoder` is the plain core: submit, cancel, step; no threads, no Ray, no HTTP, and token ids only. `generate` drives it for a list
of prompts. A reply does not depend on the company it was made in: attention is the same arithmetic everywhere (ragged.py), and
each request samples from its own stream of numbers. What remains is the rounding of a matrix product that sums in another order
for few rows than for many: in fp32 far below the distance of two logits.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from apprentice.errors import ModelError
from apprentice.inference.batch import NOT_FINITE, KvMemory, Segment, forward, prepare
from apprentice.inference.kv_slots import LEAST_SHARED, Slots, common, positions_within
from apprentice.inference.lora import Lora, LoraLayers
from apprentice.inference.sampler import GREEDY, Constraint, Sampling, adjust, draw

Finish = Literal["stop", "length"]
# Prompt tokens computed in one step: enough to fill the cores, few enough that running requests do not notice.
PREFILL_TOKENS = 512
_SCORED_ROWS = 128  # rows whose log-probabilities are made at once


@dataclass(frozen=True)
class Generation:
    """What one request asks for. It ends at one of `stop_ids`, or after `max_new_tokens`, or where the context is full.

    `logprobs` None: none; else each token comes with its log-probability and those of so many best tokens. `score_from` wants
    the same of the prompt's tokens from that place on. `adapter` is added to the model for this request alone.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: Collection[int] = ()
    sampling: Sampling = GREEDY
    constraint: Constraint | None = None
    logprobs: int | None = None
    score_from: int | None = None
    adapter: Lora | None = None


class NotFiniteError(ModelError):
    """The model's logits after a text are NaN or infinite, so no token follows; `number` says which of the texts."""

    def __init__(self, number: int) -> None:
        super().__init__(NOT_FINITE)
        self.number = number

    def __reduce__(self) -> tuple[type[NotFiniteError], tuple[int]]:
        return type(self), (self.number,)


class Scored(NamedTuple):
    """A token with its natural log-probability under the model's own logits (None for a text's first), and the best tokens'."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Token(NamedTuple):
    """One new token of the request `key`; `finish` says why it is the last, or is None. A stop id is reported too.

    `scored` is there if log-probabilities were wanted; `prompt`, with the first token, if the prompt's were. The first also says
    how many of the prompt's tokens were `shared`: another request's memory had them.
    """

    key: Hashable
    id: int
    finish: Finish | None
    scored: Scored | None = None
    prompt: tuple[Scored, ...] = ()
    shared: int = 0


@dataclass
class Running:
    """A request that holds a slot."""

    key: Hashable
    wanted: Generation
    slot: int
    pending: Sequence[int]  # tokens whose keys and values are not in memory yet
    start: int = 0  # position of the first of them
    shared: int = 0  # tokens of the prompt that did not have to be computed
    produced: int = 0
    seen: Counter[int] = field(default_factory=Counter)  # of the reply's tokens, for penalties
    prompt: list[Scored] = field(default_factory=list)


class Decoder:
    """Decodes up to `slots` requests together, each with up to `context` tokens of prompt and reply.

    `context` shrinks to what the model's positions allow. Keys and values take at most `kv_bytes` (None: what slots and context
    come to); a request that could need more than is left waits. A prompt that begins like one in memory takes its keys and values
    from there. Not thread-safe. Raises `ModelError` for a model that cannot be decoded so, or that little memory.
    """

    def __init__(
        self, model: Any, *, slots: int, context: int, kv_bytes: int | None = None, prefill_tokens: int = PREFILL_TOKENS
    ) -> None:
        tried = prepare(model)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._fit(model, slots, min(context, positions or context), kv_bytes, tried.position_bytes)
        self._model = model
        self._loras = LoraLayers(model)
        self._memory = KvMemory(self.slots, self.context)
        self._memory.allocate(tried)
        self._begin(prefill_tokens)

    def _fit(self, model: Any, slots: int, context: int, kv_bytes: int | None, of_one: int) -> None:
        """As many slots, positions of each, and positions of all as `kv_bytes` give room for, with `of_one` bytes for each."""
        # Token ids from 0 on that the model can both read and say.
        layers = model.get_input_embeddings(), model.get_output_embeddings()
        self.vocabulary = min(len(layer.weight) for layer in layers if layer is not None)
        self.kv_tokens = positions_within(kv_bytes, of_one, slots, context)
        self.context = min(context, self.kv_tokens)
        # Memory that is not touched costs nothing on a CPU; on a GPU every slot has all its positions from the start.
        on_cpu = model.device.type == "cpu"
        self.slots = slots if on_cpu else max(1, min(slots, self.kv_tokens // self.context))

    def _begin(self, prefill_tokens: int) -> None:
        self._prefill_tokens = prefill_tokens
        self._slots = Slots(self.slots, self.kv_tokens)
        self._waiting: deque[tuple[Hashable, Generation]] = deque()
        self._running: dict[Hashable, Running] = {}
        self._failures: dict[Hashable, Exception] = {}
        self.shared = 0  # prompt tokens that did not have to be computed

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    @property
    def held_tokens(self) -> int:
        """Positions of the memory that running requests use."""
        return sum(owner.start for owner in self._running.values())

    @property
    def reserved_tokens(self) -> int:
        """Positions that running requests may come to use."""
        return self._slots.reserved

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

    def take_failures(self) -> dict[Hashable, Exception]:
        """Requests that have failed since the last call, each for an error of its own; they have left."""
        failures, self._failures = self._failures, {}
        return failures

    def _fail(self, owner: Running, error: Exception) -> None:
        self._release(owner)
        self._failures[owner.key] = error

    def try_adapter(self, adapter: Lora) -> None:
        """One pass beside the running requests with the rows of two texts, of which one has `adapter`. Raises what that raises."""
        memory = KvMemory(slots=2, context=2)
        forward(self._model, memory, [Segment(0, 0, [0, 0], adapter=adapter), Segment(1, 0, [0])], self._loras)

    def step(self) -> list[Token]:
        """One forward pass for all: a token for every request whose prompt is computed. Empty if nobody is here.

        A request whose form cannot be followed fails alone (`take_failures`).
        """
        self._admit()
        segments, owners = self._segments()
        if not segments:
            return []
        logits = forward(self._model, self._memory, segments, self._loras)
        done: list[Running] = []
        rows: list[int] = []  # of the logits after the last token of those whose prompt is computed
        row = 0
        for segment, owner in zip(segments, owners, strict=True):
            if segment.every:
                self._score_prompt(owner, segment, logits[row : row + segment.kept])
            row += segment.kept
            owner.start += len(segment.ids)
            owner.pending = owner.pending[len(segment.ids) :]
            self._slots.hold(owner.slot, segment.ids)
            if not owner.pending:
                done.append(owner)
                rows.append(row - 1)
        return self._next_tokens(logits if len(rows) == len(logits) else logits[rows], done)

    def _next_tokens(self, logits: Tensor, owners: Sequence[Running]) -> list[Token]:
        """One token each, from `logits` (owners, vocabulary)."""
        if not owners:
            return []
        wishes = [owner.wanted.sampling for owner in owners]
        shaped = logits
        changed = [row for row, owner in enumerate(owners) if wishes[row].changes_logits or owner.wanted.constraint]
        if changed:
            shaped = logits.to(torch.float32, copy=True)
            for row in changed:
                try:
                    shaped[row] = adjust(logits[row], wishes[row], owners[row].seen, owners[row].wanted.constraint)
                except Exception as error:  # a form is the request's own, and whatever is wrong with it concerns nobody else
                    self._fail(owners[row], error)
        chosen = draw(shaped, wishes, [owner.produced for owner in owners])
        scored: dict[int, Scored] = {}
        if wanted := [row for row, owner in enumerate(owners) if owner.wanted.logprobs is not None]:
            tops = [owners[row].wanted.logprobs or 0 for row in wanted]
            scored = dict(zip(wanted, scores(logits[wanted], [chosen[row] for row in wanted], tops), strict=True))
        tokens = [
            self._accept(owner, chosen[row], scored.get(row)) for row, owner in enumerate(owners) if owner.key in self._running
        ]
        return [token for token in tokens if token.key not in self._failures]

    def _score_prompt(self, owner: Running, segment: Segment, logits: Tensor) -> None:
        """Keeps the scores of the prompt's tokens that follow those of `segment`, whose logits are given."""
        first = owner.wanted.score_from or 0
        if segment.start == first == 0:
            owner.prompt.append(Scored(segment.ids[0], None))
        begin = max(first, segment.start + 1)
        targets = owner.wanted.prompt[begin : segment.start + 1 + len(segment.ids)]
        rows = logits[begin - segment.start - 1 :][: len(targets)]
        owner.prompt += scores(rows, targets, [owner.wanted.logprobs or 0] * len(targets))

    def _admit(self) -> None:
        while self._waiting:
            key, wanted = self._waiting[0]
            usable = _shareable(wanted)
            if (
                self._is_being_read(wanted, usable)
                or (taken := self._slots.take(self._need(wanted), usable, _number(wanted))) is None
            ):
                return
            self._waiting.popleft()
            slot, shared = taken.slot, taken.shared
            for emptied in taken.emptied:
                self._memory.give_back(emptied)
            if shared and taken.source != slot:
                self._memory.copy(taken.source, slot, shared)
            self.shared += shared
            self._running[key] = Running(key, wanted, slot, wanted.prompt[shared:], start=shared, shared=shared)

    def _need(self, wanted: Generation) -> int:
        """Positions that the request may come to use."""
        return min(self.context, len(wanted.prompt) + wanted.max_new_tokens)

    def _is_being_read(self, wanted: Generation, usable: Sequence[int]) -> bool:
        """Whether more of the prompt is being computed for another request than any slot has: it will be there in a moment."""
        alike = [common(owner.wanted.prompt, usable) for owner in self._reading() if owner.wanted.adapter is wanted.adapter]
        return max(alike, default=0) >= self._slots.shared(usable, _number(wanted)) + LEAST_SHARED

    def _reading(self) -> list[Running]:
        """Requests whose prompts are being read."""
        return [owner for owner in self._running.values() if not owner.produced]

    def _segments(self) -> tuple[list[Segment], list[Running]]:
        room = self._prefill_tokens
        found = []
        for owner in self._running.values():  # oldest first
            ids = owner.pending[: self._prefill_tokens]
            if not owner.produced:
                # A prompt is cut at its own multiples, whatever else there is, so that its arithmetic is always the same.
                if len(ids) > room:
                    continue
                room -= len(ids)
            every = owner.wanted.score_from is not None and not owner.produced
            found.append((Segment(owner.slot, owner.start, ids, every, owner.wanted.adapter), owner))
        found.sort(key=lambda pair: pair[0].place)  # then logits need not be put into another order
        return [segment for segment, _ in found], [owner for _, owner in found]

    def _accept(self, owner: Running, chosen: int, scored: Scored | None) -> Token:
        owner.produced += 1
        owner.pending = [chosen]
        owner.seen[chosen] += 1
        finish: Finish | None = None
        if chosen in owner.wanted.stop_ids:
            finish = "stop"
        elif owner.produced >= owner.wanted.max_new_tokens or owner.start >= self.context:
            finish = "length"
        if finish:
            self._release(owner)
        elif owner.wanted.constraint:
            try:
                owner.wanted.constraint.accept(chosen)
            except Exception as error:  # as above
                self._fail(owner, error)
        if owner.produced > 1:
            return Token(owner.key, chosen, finish, scored)
        return Token(owner.key, chosen, finish, scored, tuple(owner.prompt), owner.shared)

    def _release(self, owner: Running) -> None:
        del self._running[owner.key]
        self._slots.release(owner.slot, len(owner.wanted.prompt) + owner.produced)


def _number(wanted: Generation) -> int:
    return wanted.adapter.number if wanted.adapter is not None else 0


def _shareable(wanted: Generation) -> Sequence[int]:
    """The part of the prompt that need not be computed: not its last token nor what comes before a scored one, for their logits."""
    return wanted.prompt[: len(wanted.prompt) - 1 if wanted.score_from is None else max(0, wanted.score_from - 1)]


def scores(logits: Tensor, ids: Sequence[int], tops: Sequence[int]) -> list[Scored]:
    """Each id scored under its row of `logits` (ids, vocabulary), with so many best tokens as `tops` says."""
    found: list[Scored] = []
    for first in range(0, len(ids), _SCORED_ROWS):
        part = slice(first, first + _SCORED_ROWS)
        rows = logits[part].float()
        wanted = torch.tensor(list(ids[part]), device=rows.device)[:, None]
        whole = rows.logsumexp(dim=-1, keepdim=True)
        own = (rows.gather(1, wanted) - whole)[:, 0].tolist()
        most = min(max(tops[part]), rows.shape[-1])
        best, places = (rows.topk(most, dim=-1)) if most else (whole[:, :0], wanted[:, :0])
        values, names = (best - whole).tolist(), places.tolist()
        for row, (id, count) in enumerate(zip(ids[part], tops[part], strict=True)):
            found.append(Scored(int(id), own[row], tuple(zip(names[row][:count], values[row][:count], strict=True))))
    return found


def generate(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Collection[int], max_running: int = 32
) -> list[list[int]]:
    """Greedy replies to `prompts` (token ids), in their order, without the stop id that ended them. Raises `NotFiniteError`."""
    if not prompts:
        return []
    context = max(len(prompt) for prompt in prompts) + max_new_tokens
    from apprentice.inference.unbatched import decoder_for  # which builds upon this module

    decoder = decoder_for(model, slots=min(max_running, len(prompts)), context=context, or_alone=True)
    # Prompts of like length run side by side, so that little is padded in attention.
    for number in sorted(range(len(prompts)), key=lambda number: len(prompts[number])):
        decoder.submit(number, Generation(prompts[number], max_new_tokens, frozenset(stop_ids), logprobs=0))
    replies: dict[int, list[int]] = {number: [] for number in range(len(prompts))}
    while decoder.running or decoder.waiting:
        for token in decoder.step():
            assert isinstance(token.key, int)
            if token.scored is None or token.scored.logprob is None or not math.isfinite(token.scored.logprob):
                raise NotFiniteError(token.key)
            if token.finish != "stop":
                replies[token.key].append(token.id)
    return list(replies.values())
