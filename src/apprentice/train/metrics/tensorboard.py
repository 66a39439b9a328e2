"""TensorBoard event files, written in the caller's thread, so that a full disk raises `OSError` there.

tensorboardX's own `SummaryWriter` writes in a thread. A full disk ends that thread, and adding more events then blocks for ever.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from apprentice.train.compat import close_without_flush

FLUSH_S = 10.0  # between two flushes to disk


class EventFile:
    """A new TensorBoard event file in `folder`: scalars and texts by step. Methods raise `OSError` on a full disk."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._flushed_at = 0.0

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Writes one value of a curve."""
        from tensorboardX.summary import scalar

        self._write(scalar(name, value), step)

    def add_text(self, name: str, words: str, step: int) -> None:
        """Writes a text."""
        from tensorboardX.summary import text

        self._write(text(name, words), step)

    def _write(self, summary: Any, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(summary=summary, step=step, wall_time=time.time()))
        if time.monotonic() - self._flushed_at > FLUSH_S:
            self._flushed_at = time.monotonic()
            self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()

    def give_up(self) -> None:
        """Closes the file without raising, even if there is no room for what is still buffered."""
        close_without_flush(self._writer)
