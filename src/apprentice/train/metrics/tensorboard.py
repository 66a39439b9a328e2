"""TensorBoard's events, written by whoever adds them: a full disk is an `OSError` there.

tensorboardX's own `SummaryWriter` writes in a thread, which such an error ends; who adds more events then waits for ever.
Knows nothing of what is drawn.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

FLUSH_S = 10.0


class Events:
    """One new file of events in `folder`."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._flushed_at = 0.0

    def add(self, name: str, value: float, step: int) -> None:
        from tensorboardX.summary import scalar

        self._write(scalar(name, value), step)

    def add_text(self, name: str, words: str, step: int) -> None:
        from tensorboardX.summary import text

        self._write(text(name, words), step)

    def _write(self, summary: Any, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(summary=summary, step=step, wall_time=time.time()))
        if time.monotonic() - self._flushed_at > FLUSH_S:
            self._flushed_at = time.monotonic()
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def give_up(self) -> None:
        """Closes the file, also where there is no room for what is still to be written."""
        with suppress(OSError):
            self._writer._py_recordio_writer.close()
