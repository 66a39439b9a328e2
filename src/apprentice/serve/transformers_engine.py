"""Any causal model of transformers as an engine: our decoder in a thread of its own, beside the event loop.

The thread steps while there is somebody to step for; requests and cancellations reach it through a queue that it empties between
two steps, tokens go back through the event loop. Knows nothing of text or HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import torch

from apprentice.models.decoding import Decoder, Generation
from apprentice.models.loading import load_model, resolve_dtype
from apprentice.models.sampling import Sampling
from apprentice.serve.engine import EngineFailed, NewToken, Overloaded, Request, Stats

log = logging.getLogger(__name__)


class TransformersEngine:
    """The model in `folder`, decoding up to `max_running` requests together while up to `max_queued` more wait.

    `dtype` is `auto`, `bfloat16` or `float32`; `threads` are CPU threads for the arithmetic, no more than there are CPUs.
    Raises `ModelError` if the model cannot be loaded or decoded.
    """

    def __init__(self, folder: Path, *, dtype: str, max_running: int, max_queued: int, context: int, threads: int) -> None:
        torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))
        device: Any = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(folder, resolve_dtype(dtype))
        self._decoder = Decoder(model.to(device), slots=max_running, context=context)
        self._most = max_running + max_queued
        self._replies: dict[int, _Reply] = {}
        self._numbers = itertools.count()
        self._accepted = 0
        self._produced = 0
        self._failure: str | None = None
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    @property
    def context(self) -> int:
        return self._decoder.context

    async def generate(self, request: Request) -> AsyncGenerator[NewToken, None]:
        self.check()
        if len(self._replies) >= self._most:
            raise Overloaded
        key = next(self._numbers)
        reply = self._replies[key] = _Reply(asyncio.get_running_loop())
        self._accepted += 1
        sampling = Sampling(request.temperature, request.top_p, request.seed)
        wanted = Generation(request.prompt, request.max_tokens, request.stop_ids, sampling)
        self._orders.put(lambda: self._decoder.submit(key, wanted))
        try:
            while True:
                token = await reply.arrived.get()
                if token is None:
                    raise EngineFailed(self._failure)
                yield token
                if token.finish:
                    return
        finally:
            # Reached by a finished reply and by one that nobody wants any more, wherever it stood.
            del self._replies[key]
            self._orders.put(lambda: self._decoder.cancel(key))

    def stats(self) -> Stats:
        running = self._decoder.running
        return Stats(running, max(0, len(self._replies) - running), self._accepted, self._produced)

    def check(self) -> None:
        if self._failure is not None:
            raise EngineFailed(self._failure)

    def close(self) -> None:
        self._orders.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        try:
            while self._obey():
                for token in self._decoder.step():
                    self._produced += 1
                    # A reply that has been given up is gone from the table; its cancellation is on the way.
                    if (reply := self._replies.get(token.key)) is not None:  # type: ignore[call-overload]  # our keys are numbers
                        reply.deliver(NewToken(token.id, token.finish))
            self._failure = "the engine was closed"
        except Exception as error:
            log.exception("the decoder stopped")
            self._failure = f"{type(error).__name__}: {error}"
        for reply in list(self._replies.values()):
            reply.deliver(None)

    def _obey(self) -> bool:
        """Carries out what was ordered, waiting for an order if there is nothing to decode; false when told to stop."""
        while True:
            idle = not (self._decoder.running or self._decoder.waiting)
            try:
                order = self._orders.get(block=idle)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()


class _Reply:
    """The way of one reply's tokens from the decoder's thread to the loop that waits for them; None says that none will come."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.arrived: asyncio.Queue[NewToken | None] = asyncio.Queue()

    def deliver(self, token: NewToken | None) -> None:
        # The loop is closed when the whole process ends; nobody listens then.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.arrived.put_nowait, token)
