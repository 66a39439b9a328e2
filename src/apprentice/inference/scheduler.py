"""Continuous-batching scheduler: requests share every pass, join between two passes, and leave as soon as they end.

The scheduler says who is admitted, who runs and who leaves; a runner (`runners`) computes one pass of a model. It works on token
ids, without threads, Ray or HTTP. With two KV slots, A and B submitted first and C one step later:

    step  slot 0            slot 1                       waiting
    1     prompt A → a1     prompt B → b1
    2     a1 → a2           b1 → b2, a stop id: B ends   C
    3     a2 → a3           prompt C → c1

A step has four parts: `_admit` gives slots to waiting requests, in order, while what they may come to need fits into the KV cache;
`_schedule` chooses the tokens of this pass, one of each request in decoding and up to `prefill_tokens` of prompts; the runner
computes them; `_sample` draws a token for each request whose prompt is computed, and frees the slots of those that end.

    prefill_tokens 4   A in decoding, B with a prompt of 6, C with one of 3
    step 1             A: 1 token    B: its first 4    C waits for room in the pass
    step 2             A: 1 token    B: its last 2     C: 3 do not fit beside them
    step 3             A: 1 token    B: 1 token        C: all 3

A reply does not depend on the requests that run beside it: attention is the same arithmetic in every batch, and each request draws
from random numbers of its own. What remains is the rounding of a matrix product that sums in another order for few rows than for
many: in fp32 far below the distance of two logits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from apprentice.errors import ModelError
from apprentice.inference.generation_request import Finish, GeneratedToken, GenerationRequest, ScoredToken, SplitPrompt
from apprentice.inference.kv_slots import LEAST_REUSED, KvSlots, common_prefix_length
from apprentice.inference.lora import Lora
from apprentice.inference.runners.model_runner import ModelRunner
from apprentice.inference.running_request import RunningRequest
from apprentice.inference.sampler import adjust, draw
from apprentice.inference.token_scoring import score_tokens

# Prompt tokens computed in one step: enough to fill the cores, few enough not to delay running requests.
PREFILL_TOKENS = 512


class Scheduler:
    """Scheduler of the requests of one model, which `runner` computes; at most `prefill_tokens` of prompts in one step.

    Keys and values take at most what the runner's size allows; a request that could need more than is left waits. A prompt that
    shares its beginning with one in the cache reuses those keys and values, if the runner can split prompts. Not thread-safe.
    """

    def __init__(self, runner: ModelRunner, *, prefill_tokens: int = PREFILL_TOKENS) -> None:
        self.runner = runner
        self.reused_tokens = 0  # prompt tokens reused from the cache, over all requests
        self._prefill_tokens = prefill_tokens
        self._slots = KvSlots(runner.size.slots, runner.size.positions)
        self._waiting: deque[tuple[Hashable, GenerationRequest]] = deque()
        self._running: dict[Hashable, RunningRequest] = {}
        self._failures: dict[Hashable, Exception] = {}

    @property
    def context(self) -> int:
        """Most tokens of a request: of prompt and reply together or, in an encoder-decoder, of each."""
        return self.runner.size.context

    @property
    def vocabulary(self) -> int:
        """Number of token ids, from 0 on, that the model reads and writes."""
        return self.runner.vocabulary

    @property
    def kv_tokens(self) -> int:
        """Positions of the KV cache that all requests may use together."""
        return self.runner.size.positions

    @property
    def running(self) -> int:
        """Number of requests that have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a slot."""
        return len(self._waiting)

    @property
    def used_tokens(self) -> int:
        """Cache positions that running requests use."""
        return sum(running.used_positions for running in self._running.values())

    @property
    def reserved_tokens(self) -> int:
        """Cache positions that running requests may come to use."""
        return self._slots.reserved

    def submit(self, key: Hashable, request: GenerationRequest) -> None:
        """Queues a request under a new `key`.

        Raises `ModelError` for an empty prompt, for one that leaves no room for a token in the context, and for one that the
        runner cannot compute.
        """
        if not request.prompt:
            raise ModelError("the prompt is empty; give at least one token.")
        self.runner.split_prompt(request)
        if len(request.prompt) >= self.context:
            raise ModelError(
                f"the prompt has {len(request.prompt)} tokens; the context of {self.context} leaves no room for a reply."
            )
        self._waiting.append((key, request))

    def cancel(self, key: Hashable) -> None:
        """Drops the request and frees its slot for the next step. An unknown key is ignored: that request has just ended."""
        if key in self._running:
            self._release(self._running[key])
        else:
            self._waiting = deque(item for item in self._waiting if item[0] != key)

    def take_failures(self) -> dict[Hashable, Exception]:
        """Returns and clears the requests that failed since the last call, with their errors; they have no slot any more."""
        failures, self._failures = self._failures, {}
        return failures

    def try_adapter(self, adapter: Lora) -> None:
        """Runs one pass over two short texts, one with `adapter`, in a cache of its own. Raises what the forward pass raises."""
        self.runner.try_adapter(adapter)

    def step(self) -> list[GeneratedToken]:
        """Runs one pass over all requests and returns a token for each whose prompt is fully computed.

        Empty if there are no requests. A request whose constraint raises fails alone (`take_failures`).
        """
        self._admit()
        batch = self._schedule()
        if not batch:
            return []
        logits = self.runner.run(batch)
        computed: list[RunningRequest] = []  # those whose prompt is computed
        last_rows: list[int] = []  # of the logits after their last token
        row = 0
        for running in batch:
            rows = running.logit_rows
            if running.needs_all_logits:
                running.score_prompt(logits[row : row + rows])
            row += rows
            if self.runner.splits_prompts:
                self._slots.append(running.slot, running.scheduled_ids)
            running.advance()
            if not running.pending:
                computed.append(running)
                last_rows.append(row - 1)
        return self._sample(logits if len(last_rows) == len(logits) else logits[last_rows], computed)

    def _admit(self) -> None:
        """Gives slots to waiting requests, in order, until one does not fit."""
        while self._waiting:
            key, request = self._waiting[0]
            prompt = self.runner.split_prompt(request)
            # An encoder-decoder's prompt and reply are on two sides, each with a context of its own.
            need = len(prompt.encoder_ids) + min(self.context, len(prompt.decoder_ids) + request.max_new_tokens)
            reusable = self._reusable_ids(prompt)
            if self._is_being_computed(request, reusable):
                return
            if (allocation := self._slots.allocate(need, reusable, request.adapter_number)) is None:
                return
            self._waiting.popleft()
            self.runner.begin(allocation)
            reused = allocation.reused
            self.reused_tokens += reused
            self._running[key] = RunningRequest(
                key, request, prompt, allocation.slot, prompt.decoder_ids[reused:], start=reused, reused=reused
            )

    def _reusable_ids(self, prompt: SplitPrompt) -> Sequence[int]:
        """Part of a prompt that may be reused from the cache: not tokens whose logits are needed, the last or those to score."""
        if not self.runner.splits_prompts:
            return ()
        return prompt.decoder_ids[: len(prompt.decoder_ids) - 1 if prompt.score_from is None else max(0, prompt.score_from - 1)]

    def _is_being_computed(self, request: GenerationRequest, reusable: Sequence[int]) -> bool:
        """True if a running prefill has a longer common prefix with this prompt than any slot: waiting a few steps saves work."""
        lengths = [
            common_prefix_length(running.prompt.decoder_ids, reusable)
            for running in self._running.values()
            if running.is_prefill and running.request.adapter is request.adapter
        ]
        return max(lengths, default=0) >= self._slots.count_reusable(reusable, request.adapter_number) + LEAST_REUSED

    def _schedule(self) -> list[RunningRequest]:
        """Chooses the tokens of this pass; returns the requests that run, in the order of the batch's flat row.

        A prompt is cut at fixed multiples, whatever else runs, so that its arithmetic is always the same. One that cannot be cut is
        computed whole, the first of a pass however long it is.
        """
        room = self._prefill_tokens
        batch = []
        for running in self._running.values():  # oldest first
            count = min(len(running.pending), self._prefill_tokens) if self.runner.splits_prompts else len(running.pending)
            if running.is_prefill:
                tokens = len(running.prompt.encoder_ids) + count
                if tokens > room and room < self._prefill_tokens:
                    continue
                room -= tokens
            running.scheduled = count
            batch.append(running)
        return sorted(batch, key=lambda running: (running.scheduled > 1, running.slot))

    def _sample(self, logits: Tensor, batch: Sequence[RunningRequest]) -> list[GeneratedToken]:
        """Draws one token for each of `batch` from `logits` (requests, vocabulary)."""
        if not batch:
            return []
        samplings = [running.request.sampling for running in batch]
        adjusted = logits
        changed = [row for row, running in enumerate(batch) if samplings[row].changes_logits or running.request.constraint]
        if changed:
            adjusted = logits.to(torch.float32, copy=True)
            for row in changed:
                try:
                    adjusted[row] = adjust(logits[row], samplings[row], batch[row].reply_counts, batch[row].request.constraint)
                except Exception as error:  # a constraint is the request's own, so its errors fail no other request
                    self._fail(batch[row], error)
        ids = draw(adjusted, samplings, [running.produced for running in batch])
        scores: dict[int, ScoredToken] = {}
        if scored := [row for row, running in enumerate(batch) if running.request.logprobs is not None]:
            tops = [batch[row].request.logprobs or 0 for row in scored]
            scores = dict(zip(scored, score_tokens(logits[scored], [ids[row] for row in scored], tops), strict=True))
        tokens = [
            self._accept(running, ids[row], scores.get(row)) for row, running in enumerate(batch) if running.key in self._running
        ]
        return [token for token in tokens if token.key not in self._failures]

    def _accept(self, running: RunningRequest, id: int, score: ScoredToken | None) -> GeneratedToken:
        """Adds the token `id` to a reply, and ends the request where it is the last one."""
        request = running.request
        running.produced += 1
        running.pending = [id]
        running.reply_counts[id] += 1
        finish: Finish | None = None
        if id in request.stop_ids:
            finish = "stop"
        elif running.produced >= request.max_new_tokens or running.start >= self.context:
            finish = "length"
        if finish:
            self._release(running)
        elif request.constraint:
            try:
                request.constraint.accept(id)
            except Exception as error:  # as above
                self._fail(running, error)
        if running.produced > 1:
            return GeneratedToken(running.key, id, finish, score)
        return GeneratedToken(running.key, id, finish, score, tuple(running.prompt_scores), running.reused)

    def _fail(self, running: RunningRequest, error: Exception) -> None:
        self._release(running)
        self._failures[running.key] = error

    def _release(self, running: RunningRequest) -> None:
        """Frees the slot of a request that ends."""
        del self._running[running.key]
        used = len(running.prompt.encoder_ids) + running.start + len(running.pending)
        self._slots.release(running.slot, used)
        self.runner.end(running.slot)
