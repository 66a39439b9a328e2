"""Continuous-batching scheduler: requests share every decoding step, join between two steps, and leave as soon as they end.

`Scheduler` is the core, with `submit`, `cancel` and `step`. It works on token ids, without threads, Ray or HTTP.
`decoding.generate` drives it for a list of prompts. With two KV slots, A and B submitted first and C one step later:

    step  slot 0            slot 1               waiting
    1     prompt A → a1     prompt B → b1
    2     a1 → a2           b1 → b2 (a stop id)  C
    3     a2 → a3           prompt C → c1

A reply does not depend on the requests that run beside it: attention is the same arithmetic in every batch (`batch`), and each
request draws from random numbers of its own. What remains is the rounding of a matrix product that sums in another order for few
rows than for many: in fp32 far below the distance of two logits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from apprentice.errors import ModelError
from apprentice.inference.batch import KvMemory, Segment, forward, prepare
from apprentice.inference.generation_request import Finish, GeneratedToken, GenerationRequest, RunningRequest, ScoredToken
from apprentice.inference.kv_slots import LEAST_SHARED, Slots, common, positions_within
from apprentice.inference.lora import Lora, LoraLayers
from apprentice.inference.sampler import adjust, draw

# Prompt tokens computed in one step: enough to fill the cores, few enough not to delay running requests.
PREFILL_TOKENS = 512
_SCORED_ROWS = 128  # rows whose log-probabilities are computed at once


class Scheduler:
    """Continuous-batching decoder of up to `slots` concurrent requests, each with up to `context` tokens of prompt and reply.

    `context` is cut to the model's `max_position_embeddings`. Keys and values take at most `kv_bytes` (None: slots times context);
    a request that could need more than is left waits. A prompt that shares its beginning with one in the cache reuses those keys
    and values. Not thread-safe. Raises `ModelError` for a model that cannot be decoded this way, or for too little memory.
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
        """Sets `vocabulary`, `kv_tokens`, `context` and `slots` to what fits into `kv_bytes` at `of_one` bytes a position."""
        # Number of token ids, from 0 on, that have both an input embedding and a logit.
        layers = model.get_input_embeddings(), model.get_output_embeddings()
        self.vocabulary = min(len(layer.weight) for layer in layers if layer is not None)
        self.kv_tokens = positions_within(kv_bytes, of_one, slots, context)
        self.context = min(context, self.kv_tokens)
        # On a CPU untouched memory costs nothing; on a GPU every slot has all its positions from the start.
        on_cpu = model.device.type == "cpu"
        self.slots = slots if on_cpu else max(1, min(slots, self.kv_tokens // self.context))

    def _begin(self, prefill_tokens: int) -> None:
        self._prefill_tokens = prefill_tokens
        self._slots = Slots(self.slots, self.kv_tokens)
        self._waiting: deque[tuple[Hashable, GenerationRequest]] = deque()
        self._running: dict[Hashable, RunningRequest] = {}
        self._failures: dict[Hashable, Exception] = {}
        self.shared = 0  # prompt tokens reused from the cache, over all requests

    @property
    def running(self) -> int:
        """Number of requests that hold a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a slot."""
        return len(self._waiting)

    @property
    def held_tokens(self) -> int:
        """Cache positions that running requests use."""
        return sum(owner.start for owner in self._running.values())

    @property
    def reserved_tokens(self) -> int:
        """Cache positions that running requests may come to use."""
        return self._slots.reserved

    def submit(self, key: Hashable, wanted: GenerationRequest) -> None:
        """Queues a request under a new `key`.

        Raises `ModelError` for an empty prompt, and for one that leaves no room for a token in the context.
        """
        if not wanted.prompt:
            raise ModelError("the prompt is empty; give at least one token.")
        if len(wanted.prompt) >= self.context:
            raise ModelError(
                f"the prompt has {len(wanted.prompt)} tokens; the context of {self.context} leaves no room for a reply."
            )
        self._waiting.append((key, wanted))

    def cancel(self, key: Hashable) -> None:
        """Drops the request and frees its slot for the next step. An unknown key is ignored: that request has just ended."""
        if key in self._running:
            self._release(self._running[key])
        else:
            self._waiting = deque(item for item in self._waiting if item[0] != key)

    def take_failures(self) -> dict[Hashable, Exception]:
        """Returns and clears the requests that failed since the last call, with their errors; they hold no slot any more."""
        failures, self._failures = self._failures, {}
        return failures

    def _fail(self, owner: RunningRequest, error: Exception) -> None:
        self._release(owner)
        self._failures[owner.key] = error

    def try_adapter(self, adapter: Lora) -> None:
        """Runs one pass over two short texts, one with `adapter`, in a cache of its own. Raises what the forward pass raises."""
        memory = KvMemory(slots=2, context=2)
        forward(self._model, memory, [Segment(0, 0, [0, 0], adapter=adapter), Segment(1, 0, [0])], self._loras)

    def step(self) -> list[GeneratedToken]:
        """Runs one forward pass for all requests and returns a token for each whose prompt is fully computed.

        Empty if there are no requests. A request whose constraint raises fails alone (`take_failures`).
        """
        self._admit()
        segments, owners = self._segments()
        if not segments:
            return []
        logits = forward(self._model, self._memory, segments, self._loras)
        done: list[RunningRequest] = []
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

    def _next_tokens(self, logits: Tensor, owners: Sequence[RunningRequest]) -> list[GeneratedToken]:
        """Samples one token for each of `owners` from `logits` (owners, vocabulary)."""
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
                except Exception as error:  # a constraint is the request's own, so its errors fail no other request
                    self._fail(owners[row], error)
        chosen = draw(shaped, wishes, [owner.produced for owner in owners])
        scored: dict[int, ScoredToken] = {}
        if wanted := [row for row, owner in enumerate(owners) if owner.wanted.logprobs is not None]:
            tops = [owners[row].wanted.logprobs or 0 for row in wanted]
            scored = dict(zip(wanted, scores(logits[wanted], [chosen[row] for row in wanted], tops), strict=True))
        tokens = [
            self._accept(owner, chosen[row], scored.get(row)) for row, owner in enumerate(owners) if owner.key in self._running
        ]
        return [token for token in tokens if token.key not in self._failures]

    def _score_prompt(self, owner: RunningRequest, segment: Segment, logits: Tensor) -> None:
        """Scores the prompt's tokens that follow those of `segment`, from its `logits` (tokens of the segment, vocabulary)."""
        first = owner.wanted.score_from or 0
        if segment.start == first == 0:
            owner.prompt.append(ScoredToken(segment.ids[0], None))
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
            self._running[key] = RunningRequest(key, wanted, slot, wanted.prompt[shared:], start=shared, shared=shared)

    def _need(self, wanted: GenerationRequest) -> int:
        """Cache positions that the request may come to use."""
        return min(self.context, len(wanted.prompt) + wanted.max_new_tokens)

    def _is_being_read(self, wanted: GenerationRequest, usable: Sequence[int]) -> bool:
        """True if a running prefill has a longer common prefix with this prompt than any slot: waiting a few steps saves work."""
        alike = [common(owner.wanted.prompt, usable) for owner in self._reading() if owner.wanted.adapter is wanted.adapter]
        return max(alike, default=0) >= self._slots.shared(usable, _number(wanted)) + LEAST_SHARED

    def _reading(self) -> list[RunningRequest]:
        """Running requests in prefill: they have no new token yet."""
        return [owner for owner in self._running.values() if not owner.produced]

    def _segments(self) -> tuple[list[Segment], list[RunningRequest]]:
        room = self._prefill_tokens
        found = []
        for owner in self._running.values():  # oldest first
            ids = owner.pending[: self._prefill_tokens]
            if not owner.produced:
                # A prompt is cut at fixed multiples, whatever else runs, so that its arithmetic is always the same.
                if len(ids) > room:
                    continue
                room -= len(ids)
            every = owner.wanted.score_from is not None and not owner.produced
            found.append((Segment(owner.slot, owner.start, ids, every, owner.wanted.adapter), owner))
        found.sort(key=lambda pair: pair[0].place)  # the order of the flat row, so that logits need not be reordered
        return [segment for segment, _ in found], [owner for _, owner in found]

    def _accept(self, owner: RunningRequest, chosen: int, scored: ScoredToken | None) -> GeneratedToken:
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
            return GeneratedToken(owner.key, chosen, finish, scored)
        return GeneratedToken(owner.key, chosen, finish, scored, tuple(owner.prompt), owner.shared)

    def _release(self, owner: RunningRequest) -> None:
        del self._running[owner.key]
        self._slots.release(owner.slot, len(owner.wanted.prompt) + owner.produced)


def _number(wanted: GenerationRequest) -> int:
    return wanted.adapter.number if wanted.adapter is not None else 0


def _shareable(wanted: GenerationRequest) -> Sequence[int]:
    """Part of the prompt that may be reused from the cache: without tokens whose logits are needed, the last or those to score."""
    return wanted.prompt[: len(wanted.prompt) - 1 if wanted.score_from is None else max(0, wanted.score_from - 1)]


def scores(logits: Tensor, ids: Sequence[int], tops: Sequence[int]) -> list[ScoredToken]:
    """Log-probability of each id under its row of `logits` (ids, vocabulary), with the `tops[row]` most probable tokens."""
    found: list[ScoredToken] = []
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
            found.append(ScoredToken(int(id), own[row], tuple(zip(names[row][:count], values[row][:count], strict=True))))
    return found
