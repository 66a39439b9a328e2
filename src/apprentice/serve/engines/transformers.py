"""Engine for transformers' causal models and encoder-decoders: our decoder in a thread of its own, beside the event loop.

    event loop ── generate, close ──▶ queue of orders ──▶ decoder thread: all orders, one step, all orders, one step, …
    event loop ◀── call_soon_threadsafe(tokens) ───────── decoder thread

The thread steps while it has requests, and waits for an order while it has none. PyTorch's arithmetic happens in that thread, the
model's loading included (adapters are read in threads that end at once): OpenMP keeps helper threads for each thread that ever used
some. Once there are more of them than CPUs they sleep between two operations, and waking them takes longer than the operation.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch

from apprentice.errors import ModelError
from apprentice.inference.cpu_linear import place_model
from apprentice.inference.decoding import make_scheduler
from apprentice.inference.generation_request import GeneratedToken, GenerationRequest
from apprentice.inference.lora import Lora, read_lora
from apprentice.inference.sampler import Sampling
from apprentice.inference.token_pacing import pacing_seconds
from apprentice.models.loading import load_model, resolve_dtype
from apprentice.models.model_kind import has_virtual_tokens
from apprentice.serve.engines.base import EngineFailed, NewToken, Overloaded, Request, RequestFailed, Score, Stats

log = logging.getLogger(__name__)


class TransformersEngine:
    """`Engine` over the model in `folder`: decodes up to `max_running` requests together while up to `max_queued` more wait.

    `dtype` is `auto`, `bfloat16` or `float32`. The KV cache takes at most `kv_bytes` bytes (None: `max_running` contexts).
    `threads` CPU threads do the arithmetic, but no more than there are CPUs. Raises `ModelError` if the model cannot be loaded or
    decoded.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        max_running: int,
        max_queued: int,
        context: int,
        threads: int,
        kv_bytes: int | None = None,
        trust: bool = False,
    ) -> None:
        def load() -> None:
            torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._model: Any = place_model(load_model(folder, resolve_dtype(dtype), trust=trust), device)
            self._decoder = make_scheduler(self._model, slots=max_running, context=context, kv_bytes=kv_bytes)

        self._most = max_running + max_queued
        self._replies: dict[int, _Reply] = {}
        self._numbers = itertools.count()
        self._accepted = 0
        self._produced = 0
        self._prompt_tokens = 0
        self._held_tokens = self._reserved_tokens = 0
        self._failure: str | None = None
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        loaded: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(load, loaded), name="decoder", daemon=True)
        self._thread.start()
        loaded.result()

    @property
    def context(self) -> int:
        return self._decoder.context

    @property
    def capacity(self) -> int:
        return self._most

    @property
    def vocabulary(self) -> int:
        return self._decoder.vocabulary

    def adapter(self, folder: Path) -> Lora:
        if has_virtual_tokens(self._model):
            raise ModelError("the model that is served has virtual tokens of its own, and takes no adapters; serve its base.")
        with ThreadPoolExecutor(1) as short_lived:
            adapter = short_lived.submit(read_lora, folder, self._model).result()
        self._try(adapter, folder)
        return adapter

    def _try(self, adapter: Lora, folder: Path) -> None:
        """Runs one forward pass with the adapter, so that an unusable one is refused here and fails nobody's reply."""
        tried: Future[None] = Future()

        def attempt() -> None:
            try:
                self._decoder.try_adapter(adapter)
                tried.set_result(None)
            except (ModelError, RuntimeError, ValueError, TypeError) as error:
                tried.set_exception(ModelError(f"the adapter in {folder} cannot be applied: {error}"))

        self._orders.put(attempt)
        while not tried.done():
            self.check()  # a decoder that has stopped carries out no orders
            with suppress(TimeoutError):
                tried.exception(timeout=1.0)
        tried.result()

    def generate(self, requests: list[Request]) -> list[_Reply]:
        self.check()
        if len(self._replies) + len(requests) > self._most:
            raise Overloaded
        replies = [self._begin(request) for request in requests]
        if self._failure is not None:  # in the meantime: the thread has told only the replies that it saw in the table
            for reply in replies:
                reply.close()
            self.check()
        return replies

    def _begin(self, request: Request) -> _Reply:
        key = next(self._numbers)
        reply = self._replies[key] = _Reply(lambda: self._forget(key), lambda: self._failure)
        self._accepted += 1
        self._prompt_tokens += len(request.prompt)
        sampling = Sampling(
            request.temperature,
            request.top_p,
            request.seed,
            request.frequency_penalty,
            request.presence_penalty,
            request.logit_bias,
        )
        wanted = GenerationRequest(
            request.prompt,
            request.max_tokens,
            request.stop_ids,
            sampling,
            request.constraint,
            request.logprobs,
            request.score_from,
            request.adapter,
        )
        self._orders.put(lambda: self._submit(key, wanted))
        return reply

    def _submit(self, key: int, wanted: GenerationRequest) -> None:
        try:
            self._decoder.submit(key, wanted)
        except Exception as error:  # of whatever type, it concerns this request only
            self._fail(key, error)

    def _fail(self, key: int, error: Exception) -> None:
        """Ends the reply `key` with `error`; other replies go on."""
        if not isinstance(error, ModelError):
            log.error("a request failed", exc_info=error)
        if (reply := self._replies.get(key)) is not None:
            reply.reason = str(error) or type(error).__name__
            self._deliver([(reply, None)])

    def _forget(self, key: int) -> None:
        """Drops a reply that has ended or is given up, and cancels its request in the decoder."""
        if self._replies.pop(key, None) is not None:
            self._orders.put(lambda: self._decoder.cancel(key))

    def stats(self) -> Stats:
        decoder = self._decoder
        running = decoder.running
        return Stats(
            running,
            max(0, len(self._replies) - running),
            self._accepted,
            self._produced,
            self._prompt_tokens,
            decoder.reused_tokens,
            self._held_tokens / decoder.kv_tokens,
            self._reserved_tokens / decoder.kv_tokens,
            decoder.kv_tokens,
        )

    def check(self) -> None:
        if self._failure is not None:
            raise EngineFailed(self._failure)

    def close(self) -> None:
        self._orders.put(None)
        self._thread.join(timeout=30)

    def _run(self, load: Callable[[], None], loaded: Future[None]) -> None:
        try:
            load()
            loaded.set_result(None)
        except BaseException as error:  # raised again in __init__, which waits for it
            loaded.set_exception(error)
            return
        try:
            while self._obey():
                self._pass_on(self._decoder.step())
            self._failure = "the engine was closed"
        except BaseException as error:  # whatever ends this thread, no reply may wait for ever
            self._failure = f"{type(error).__name__}: {error}"
            log.exception("the decoder stopped")
        self._deliver([(reply, None) for reply in list(self._replies.values())])

    def _pass_on(self, tokens: list[GeneratedToken]) -> None:
        """Sends a step's tokens to their replies, with one call into the event loop; under load some are held for a later step."""
        self._produced += len(tokens)
        self._weigh()
        for key, error in self._decoder.take_failures().items():
            self._fail(key, error)  # type: ignore[arg-type]  # our keys are numbers
        now = time.monotonic()
        interval = pacing_seconds(self._decoder.running)
        ready: list[tuple[_Reply, list[NewToken] | None]] = []
        for token in tokens:
            # A reply that was given up is gone from the table; its cancellation is in the queue.
            reply = self._replies.get(token.key)  # type: ignore[call-overload]  # our keys are numbers
            if reply is None:
                continue
            reply.held.append(_new_token(token))
            if token.finish or now - reply.passed_on >= interval:
                ready.append((reply, reply.held))
                reply.held, reply.passed_on = [], now
        self._deliver(ready)

    def _weigh(self) -> None:
        """Notes how much of the KV memory is used and reserved, for `stats`."""
        self._held_tokens, self._reserved_tokens = self._decoder.used_tokens, self._decoder.reserved_tokens

    def _deliver(self, ready: list[tuple[_Reply, list[NewToken] | None]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Reply, list[NewToken] | None]]] = {}
        for reply, tokens in ready:
            by_loop.setdefault(reply.loop, []).append((reply, tokens))
        for loop, items in by_loop.items():
            # The loop is closed when the whole process ends; nobody waits for tokens then.
            if not loop.is_closed():
                loop.call_soon_threadsafe(_arrive, items)

    def _obey(self) -> bool:
        """Carries out the orders in the queue, waiting for one if there is nothing to decode; false at the order to stop."""
        while True:
            idle = not (self._decoder.running or self._decoder.waiting)
            try:
                order = self._orders.get(block=idle)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()
            self._weigh()  # a cancellation may be the last event for a long time


class _Reply:
    """Token stream of one reply: the decoder's thread collects tokens in `held`, the event loop reads them from `arrived`."""

    def __init__(self, forget: Callable[[], None], failure: Callable[[], str | None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.held: list[NewToken] = []  # only the decoder's thread uses these two
        self.passed_on = 0.0
        self.arrived: list[NewToken] = []
        self.reason: str | None = None  # why this reply alone fails
        self.failed = False
        self.news = asyncio.Event()
        self._ended = False
        self._forget = forget
        self._failure = failure

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[NewToken]:
        if self._ended:
            raise StopAsyncIteration
        await self.news.wait()
        self.news.clear()
        tokens, self.arrived = self.arrived, []
        if not tokens:
            if self.reason is not None:
                raise RequestFailed(self.reason)
            raise EngineFailed(self._failure())
        self._ended = tokens[-1].finish is not None
        if self.failed:
            self.news.set()
        return tokens

    def close(self) -> None:
        self._forget()


def _arrive(items: list[tuple[_Reply, list[NewToken] | None]]) -> None:
    """Gives each reply its tokens, in the event loop; None says that no more will come."""
    for reply, tokens in items:
        if tokens is None:
            reply.failed = True
        else:
            reply.arrived += tokens
        reply.news.set()


def _new_token(token: GeneratedToken) -> NewToken:
    if token.score is None and not token.prompt_scores:
        return NewToken(token.id, token.finish, cached=token.reused)
    scored = token.score and Score(*token.score)
    return NewToken(token.id, token.finish, scored, tuple(Score(*one) for one in token.prompt_scores), token.reused)
