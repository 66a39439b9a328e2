"""Feeds a metrics backend from a thread of its own, so that one that hangs or is slow never holds up training.

    Tracker ── add() ──▶ queue (at most `WAITING` records) ──▶ thread ──▶ Service.add() ──▶ MLflow, W&B, Ray

Records that find the queue full are lost, and that is reported.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

WAITING = 1000  # records that may wait for a service
PATIENCE_S = 30.0  # seconds to wait for a service at the end


class MetricsBackend(Protocol):
    """A metrics backend: takes figures by name (such as `train/loss`) at a step."""

    def add(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class BackendWriter:
    """Runs a metrics backend in its own thread. `opened()` makes the backend, and is called in that thread.

    An error of the backend ends the feed and becomes a message; it is never raised to the caller.
    """

    def __init__(self, name: str, opened: Callable[[], MetricsBackend], *, waiting: int = WAITING) -> None:
        self._name = name
        self._opened = opened
        self._queue: queue.Queue[tuple[Mapping[str, float], int] | None] = queue.Queue(waiting)
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lost = 0
        self._over = threading.Event()  # set once records are no longer taken
        self._thread = threading.Thread(target=self._feed, name=f"apprentice-{name}", daemon=True)
        self._thread.start()

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Queues one record. Never blocks: if the queue is full, the record is lost."""
        if self._over.is_set():
            return
        try:
            self._queue.put_nowait((values, step))
        except queue.Full:
            if self._lost == 0:
                self._news.put(f"{self._name} does not keep up: figures from step {step} on are lost to it; training goes on.")
            self._lost += 1

    def told(self) -> list[str]:
        """Messages for the user since the last call."""
        found = []
        while not self._news.empty():
            found.append(self._news.get())
        return found

    def close(self, patience_s: float = PATIENCE_S) -> None:
        """Waits at most `patience_s` seconds for the service to take what is left."""
        until = time.monotonic() + patience_s
        with suppress(queue.Full):
            self._queue.put(None, timeout=patience_s)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._over.set()
            self._news.put(f"{self._name} did not answer for {patience_s:g} seconds at the end; it lacks the last figures.")
        elif self._lost:
            self._news.put(f"{self._name} lacks {self._lost} of the run's records, because it did not keep up.")

    def _feed(self) -> None:
        try:
            service = self._opened()
        except Exception as error:  # services raise errors of many kinds, and none is a reason not to train
            self._give_up(f"{self._name} does not take the run's figures ({_said(error)}); training goes on.")
            return
        while (record := self._queue.get()) is not None:
            try:
                service.add(*record)
            except Exception as error:
                self._give_up(f"{self._name} takes no more figures ({_said(error)}); training goes on.")
                return
        try:
            service.close()
        except Exception as error:
            self._news.put(f"{self._name} may lack the last figures ({_said(error)}).")

    def _give_up(self, news: str) -> None:
        self._over.set()
        self._news.put(news)
        while not self._queue.empty():  # `close` may be waiting for room in the queue
            self._queue.get()


def _said(error: Exception) -> str:
    """An error's text on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200]
