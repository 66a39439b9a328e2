"""RecordFeeds: one reader a run, which all clients of the board share; it looks at the file only while somebody watches.

A finished run is not looked at: its stream ends at once.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

from apprentice.board.metric_series import MetricSeries
from apprentice.board.run_list import holder_of
from apprentice.run.folder import Run

LOOK_EVERY_S = 1.0  # at a file on a disk
LOOK_AT_STORE_EVERY_S = 15.0  # an object store is asked for money
_MOST_SERIES = 32  # runs whose series are kept in memory
_MOST_WAITING = 64  # batches that a slow client may lag behind


class RecordFeed:
    """The series of one run, and the clients that watch it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._series = MetricSeries(run)
        self._lock = threading.Lock()
        self._clients: set[asyncio.Queue[list[dict[str, Any]] | None]] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_watched(self) -> bool:
        """Whether a client watches."""
        return bool(self._clients)

    def series(self) -> MetricSeries:
        """The run's series as the file is now; call it in a thread, since a long file takes seconds."""
        with self._lock:
            records = self._series.read()
        if records and self._task is not None:
            self._task.get_loop().call_soon_threadsafe(self._send, records)
        return self._series

    def _look(self) -> tuple[list[dict[str, Any]], bool]:
        """(new records, whether a process holds the run)."""
        is_live = holder_of(self._run) is not None
        with self._lock:
            return self._series.read(), is_live

    async def watch(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Batches of records as they are written; ends when nobody holds the run any more."""
        queue: asyncio.Queue[list[dict[str, Any]] | None] = asyncio.Queue()
        self._clients.add(queue)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._follow())
        try:
            while (batch := await queue.get()) is not None:
                yield batch
        finally:
            self._clients.discard(queue)
            if not self._clients and self._task is not None:
                self._task.cancel()
                self._task = None

    async def _follow(self) -> None:
        pause = LOOK_EVERY_S if self._run.folder.is_local else LOOK_AT_STORE_EVERY_S
        is_live = True
        try:
            while is_live:
                records, is_live = await asyncio.to_thread(self._look)
                self._send(records)
                if is_live:
                    await asyncio.sleep(pause)
        finally:
            for queue in self._clients:
                queue.put_nowait(None)

    def _send(self, records: list[dict[str, Any]]) -> None:
        if not records:
            return
        for queue in list(self._clients):
            if queue.qsize() >= _MOST_WAITING:  # it does not read: its page asks again
                self._clients.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(records)


class RecordFeeds:
    """The feeds of all runs; those used least recently are forgotten."""

    def __init__(self) -> None:
        self._feeds: OrderedDict[str, RecordFeed] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, run: Run) -> RecordFeed:
        """The feed of `run`."""
        with self._lock:
            feed = self._feeds.pop(run.folder.uri, None) or RecordFeed(run)
            self._feeds[run.folder.uri] = feed
            unwatched = [uri for uri, other in self._feeds.items() if not other.is_watched and other is not feed]
            for uri in unwatched[: max(0, len(self._feeds) - _MOST_SERIES)]:
                del self._feeds[uri]
            return feed
