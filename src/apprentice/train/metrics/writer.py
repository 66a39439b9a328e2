"""Writer of a metrics backend in a thread of its own, so that one that hangs or is slow never holds up training.

    Tracker ── add() ──▶ queue (at most `MOST_QUEUED` records) ──▶ thread ──▶ MetricsBackend.add() ──▶ MLflow, W&B, Ray

Records that find the queue full are lost, and that is reported. The thread is a daemon and not one of a `ThreadPoolExecutor`:
Python joins an executor's threads when it exits, so a backend that never answers would keep the command from ending.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

MOST_QUEUED = 1000  # records that may wait for a backend
CLOSE_TIMEOUT_S = 30.0


class MetricsBackend(Protocol):
    """A metrics backend: takes figures by name (such as `train/loss`) at a step."""

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Takes the figures of one record."""

    def close(self) -> None:
        """Ends the run at the backend."""


class BackendWriter:
    """Runs a metrics backend in its own thread. `factory()` makes the backend, and is called in that thread.

    An error of the backend ends the writer and becomes a message; it is never raised to the caller.
    """

    def __init__(self, name: str, factory: Callable[[], MetricsBackend], *, most_queued: int = MOST_QUEUED) -> None:
        self._name = name
        self._factory = factory
        self._queue: queue.Queue[tuple[Mapping[str, float], int] | None] = queue.Queue(most_queued)
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lost = 0
        self._is_closed = threading.Event()  # set once records are no longer taken
        self._thread = threading.Thread(target=self._write_all, name=f"apprentice-{name}", daemon=True)
        self._thread.start()

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Queues one record. Never blocks: if the queue is full, the record is lost."""
        if self._is_closed.is_set():
            return
        try:
            self._queue.put_nowait((values, step))
        except queue.Full:
            if self._lost == 0:
                self._messages.put(f"{self._name} does not keep up: figures from step {step} on are lost to it; training goes on.")
            self._lost += 1

    def take_messages(self) -> list[str]:
        """Messages for the user since the last call."""
        messages = []
        while not self._messages.empty():
            messages.append(self._messages.get())
        return messages

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Waits at most `timeout_s` seconds for the backend to take what is left."""
        until = time.monotonic() + timeout_s
        with suppress(queue.Full):
            self._queue.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._is_closed.set()
            self._messages.put(f"{self._name} did not answer for {timeout_s:g} seconds at the end; it lacks the last figures.")
        elif self._lost:
            self._messages.put(f"{self._name} lacks {self._lost} of the run's records, because it did not keep up.")

    def _write_all(self) -> None:
        try:
            backend = self._factory()
        except Exception as error:  # backends raise errors of many kinds, and none is a reason not to train
            self._give_up(f"{self._name} does not take the run's figures ({_one_line(error)}); training goes on.")
            return
        while (record := self._queue.get()) is not None:
            try:
                backend.add(*record)
            except Exception as error:
                self._give_up(f"{self._name} takes no more figures ({_one_line(error)}); training goes on.")
                return
        try:
            backend.close()
        except Exception as error:
            self._messages.put(f"{self._name} may lack the last figures ({_one_line(error)}).")

    def _give_up(self, message: str) -> None:
        self._is_closed.set()
        self._messages.put(message)
        while not self._queue.empty():  # `close` may be waiting for room in the queue
            self._queue.get()


def _one_line(error: Exception) -> str:
    """An error's text on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200]
