"""A service that takes a run's figures, in a thread of its own: one that hangs or is slow holds up nobody.

Knows nothing of what the services are.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

WAITING = 1000  # records at most that a service has not taken yet
PATIENCE_S = 30.0  # with it at the end


class Service(Protocol):
    """Takes figures by name (such as `train/loss`) at a step."""

    def add(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Feed:
    """What `opened()` gives is fed and closed where it was opened. `told()` gives what a person should know of it, once."""

    def __init__(self, name: str, opened: Callable[[], Service], *, waiting: int = WAITING) -> None:
        self._name = name
        self._opened = opened
        self._queue: queue.Queue[tuple[Mapping[str, float], int] | None] = queue.Queue(waiting)
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lost = 0
        self._over = threading.Event()  # nothing more is taken
        self._thread = threading.Thread(target=self._feed, name=f"apprentice-{name}", daemon=True)
        self._thread.start()

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Never waits: where too many records wait already, this one is lost."""
        if self._over.is_set():
            return
        try:
            self._queue.put_nowait((values, step))
        except queue.Full:
            if self._lost == 0:
                self._news.put(f"{self._name} does not keep up: figures from step {step} on are lost to it; training goes on.")
            self._lost += 1

    def told(self) -> list[str]:
        """The sentences since the last call."""
        found = []
        while not self._news.empty():
            found.append(self._news.get())
        return found

    def close(self, patience_s: float = PATIENCE_S) -> None:
        """Waits that long for the service to take what is left."""
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
        except Exception as error:  # theirs are of many kinds, and none is a reason not to train
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
        while not self._queue.empty():  # `close` may wait for room
            self._queue.get()


def _said(error: Exception) -> str:
    """In one line."""
    return " ".join(str(error).split())[:200]
