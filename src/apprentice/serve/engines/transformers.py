"""Engine for transformers' causal models and encoder-decoders: our decoder in a thread of its own, beside the event loop.

    event loop ── generate, close ──▶ queue of commands ──▶ decoder thread: all commands, one step, all commands, one step, …
    event loop ◀── call_soon_threadsafe(tokens) ───────── decoder thread

The thread steps while it has requests, and waits for a command while it has none. PyTorch's arithmetic happens in that thread, the
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
from apprentice.inference.token_pacing import pacing_seconds
from apprentice.models.loading import load_model, resolve_dtype
from apprentice.models.model_kind import has_virtual_tokens
from apprentice.serve.engines.base import EngineFailed, EngineStats, Overloaded, RequestFailed

log = logging.getLogger(__name__)


class TransformersEngine:
    """`Engine` over the model in `folder`: decodes up to `max_running` requests together while up to `max_queued` more wait.

    `dtype` is `auto`, `bfloat16` or `float32`; `device` "cpu" or "cuda" (None: a GPU if there is one). The KV cache takes at most
    `kv_bytes` bytes (None: `max_running` contexts).
    `threads` CPU threads do the arithmetic, but no more than there are CPUs. Raises `ModelError` if the model cannot be loaded or
    decoded.
    """

    follows_any_constraint = True

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
        device: str | None = None,
    ) -> None:
        def load() -> None:
            torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))
            place = device or ("cuda" if torch.cuda.is_available() else "cpu")
            self._model: Any = place_model(load_model(folder, resolve_dtype(dtype, place), trust=trust), place)
            self._scheduler = make_scheduler(self._model, slots=max_running, context=context, kv_bytes=kv_bytes)

        self._capacity = max_running + max_queued
        self._streams: dict[int, TransformersStream] = {}
        self._numbers = itertools.count()
        self._accepted = 0
        self._produced = 0
        self._prompt_tokens = 0
        self._used_tokens = self._reserved_tokens = 0
        self._failure: str | None = None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        loaded: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(load, loaded), name="decoder", daemon=True)
        self._thread.start()
        loaded.result()

    @property
    def context(self) -> int:
        """Most tokens of prompt and reply together."""
        return self._scheduler.context

    @property
    def capacity(self) -> int:
        """Most requests that run and wait together."""
        return self._capacity

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model's weights have."""
        return self._scheduler.vocabulary

    def load_adapter(self, folder: Path) -> Lora:
        """Loads the adapter in `folder` and tries whether the decoder takes it. Raises `ModelError`."""
        if has_virtual_tokens(self._model):
            raise ModelError("the model that is served has virtual tokens of its own, and takes no adapters; serve its base.")
        with ThreadPoolExecutor(1) as short_lived:
            adapter = short_lived.submit(read_lora, folder, self._model).result()
        self._try_adapter(adapter, folder)
        return adapter

    def _try_adapter(self, adapter: Lora, folder: Path) -> None:
        """Runs one forward pass with the adapter, so that an unusable one is refused here and fails nobody's reply."""
        result: Future[None] = Future()

        def attempt() -> None:
            try:
                self._scheduler.try_adapter(adapter)
                result.set_result(None)
            except (ModelError, RuntimeError, ValueError, TypeError) as error:
                result.set_exception(ModelError(f"the adapter in {folder} cannot be applied: {error}"))

        self._commands.put(attempt)
        while not result.done():
            self.check()  # a decoder that has stopped carries out no commands
            with suppress(TimeoutError):
                result.exception(timeout=1.0)
        result.result()

    def generate(self, requests: list[GenerationRequest]) -> list[TransformersStream]:
        """Passes the requests to the decoder. Raises `Overloaded` or `EngineFailed`, and accepts none then."""
        self.check()
        if len(self._streams) + len(requests) > self._capacity:
            raise Overloaded
        streams = [self._start(request) for request in requests]
        if self._failure is not None:  # in the meantime: the thread has ended only the streams that it saw in the table
            for stream in streams:
                stream.close()
            self.check()
        return streams

    def _start(self, request: GenerationRequest) -> TransformersStream:
        key = next(self._numbers)
        stream = self._streams[key] = TransformersStream(lambda: self._forget(key), lambda: self._failure)
        self._accepted += 1
        self._prompt_tokens += len(request.prompt)
        self._commands.put(lambda: self._submit(key, request))
        return stream

    def _submit(self, key: int, request: GenerationRequest) -> None:
        try:
            self._scheduler.submit(key, request)
        except Exception as error:  # of whatever type, it concerns this request only
            self._fail(key, error)

    def _fail(self, key: int, error: Exception) -> None:
        """Ends the stream `key` with `error`; other streams go on."""
        if not isinstance(error, ModelError):
            log.error("a request failed", exc_info=error)
        if (stream := self._streams.get(key)) is not None:
            stream.reason = str(error) or type(error).__name__
            self._deliver([(stream, None)])

    def _forget(self, key: int) -> None:
        """Drops a stream that has ended or is given up, and cancels its request in the decoder."""
        if self._streams.pop(key, None) is not None:
            self._commands.put(lambda: self._scheduler.cancel(key))

    def stats(self) -> EngineStats:
        """The current gauges and counters."""
        scheduler = self._scheduler
        running = scheduler.running
        return EngineStats(
            running,
            max(0, len(self._streams) - running),
            self._accepted,
            self._produced,
            self._prompt_tokens,
            scheduler.reused_tokens,
            self._used_tokens / scheduler.kv_tokens,
            self._reserved_tokens / scheduler.kv_tokens,
            scheduler.kv_tokens,
        )

    def check(self) -> None:
        """Raises `EngineFailed` if the decoder has stopped."""
        if self._failure is not None:
            raise EngineFailed(self._failure)

    def close(self) -> None:
        """Stops the decoder; replies in progress fail."""
        self._commands.put(None)
        self._thread.join(timeout=30)

    def _run(self, load: Callable[[], None], loaded: Future[None]) -> None:
        try:
            load()
            loaded.set_result(None)
        except BaseException as error:  # raised again in __init__, which waits for it
            loaded.set_exception(error)
            return
        try:
            while self._run_commands():
                self._send(self._scheduler.step())
            self._failure = "the engine was closed"
        except BaseException as error:  # whatever ends this thread, no reply may wait for ever
            self._failure = f"{type(error).__name__}: {error}"
            log.exception("the decoder stopped")
        self._deliver([(stream, None) for stream in list(self._streams.values())])

    def _send(self, tokens: list[GeneratedToken]) -> None:
        """Sends a step's tokens to their replies, with one call into the event loop; under load some are kept for a later step."""
        self._produced += len(tokens)
        self._measure_kv()
        for key, error in self._scheduler.take_failures().items():
            self._fail(key, error)  # type: ignore[arg-type]  # our keys are numbers
        now = time.monotonic()
        interval_s = pacing_seconds(self._scheduler.running)
        deliveries: list[Delivery] = []
        for token in tokens:
            # A stream that was given up is gone from the table; its cancellation is in the queue.
            stream = self._streams.get(token.key)  # type: ignore[call-overload]  # our keys are numbers
            if stream is None:
                continue
            stream.unsent.append(token)
            if token.finish or now - stream.sent_at >= interval_s:
                deliveries.append((stream, stream.unsent))
                stream.unsent, stream.sent_at = [], now
        self._deliver(deliveries)

    def _measure_kv(self) -> None:
        """Measures how much of the KV memory is used and reserved, for `stats`."""
        self._used_tokens, self._reserved_tokens = self._scheduler.used_tokens, self._scheduler.reserved_tokens

    def _deliver(self, deliveries: list[Delivery]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
        for stream, tokens in deliveries:
            by_loop.setdefault(stream.loop, []).append((stream, tokens))
        for loop, items in by_loop.items():
            # The loop is closed when the whole process ends; nobody waits for tokens then.
            if not loop.is_closed():
                loop.call_soon_threadsafe(_receive, items)

    def _run_commands(self) -> bool:
        """Carries out the commands in the queue, waiting for one if there is nothing to decode; false at the command to stop."""
        while True:
            idle = not (self._scheduler.running or self._scheduler.waiting)
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            self._measure_kv()  # a cancellation may be the last event for a long time


class TransformersStream:
    """Token stream of one reply: the decoder's thread collects tokens in `unsent`, the event loop reads them from `received`."""

    def __init__(self, forget: Callable[[], None], failure: Callable[[], str | None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.unsent: list[GeneratedToken] = []  # only the decoder's thread uses these two
        self.sent_at = 0.0
        self._received: list[GeneratedToken] = []
        self.reason: str | None = None  # why this reply alone fails
        self._has_failed = False
        self._news = asyncio.Event()
        self._ended = False
        self._forget = forget
        self._failure = failure

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[GeneratedToken]:
        if self._ended:
            raise StopAsyncIteration
        await self._news.wait()
        self._news.clear()
        tokens, self._received = self._received, []
        if not tokens:
            if self.reason is not None:
                raise RequestFailed(self.reason)
            raise EngineFailed(self._failure())
        self._ended = tokens[-1].finish is not None
        if self._has_failed:
            self._news.set()
        return tokens

    def receive(self, tokens: list[GeneratedToken] | None) -> None:
        """Adds tokens, in the event loop; None says that no more will come."""
        if tokens is None:
            self._has_failed = True
        else:
            self._received += tokens
        self._news.set()

    def close(self) -> None:
        """Ends the stream, and cancels its request in the decoder."""
        self._forget()


# A stream and its next tokens; None says that no more will come.
Delivery = tuple[TransformersStream, list[GeneratedToken] | None]


def _receive(deliveries: list[Delivery]) -> None:
    """Gives each stream its tokens, in the event loop."""
    for stream, tokens in deliveries:
        stream.receive(tokens)
