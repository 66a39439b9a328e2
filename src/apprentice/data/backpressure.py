"""A callback that slows Ray Data's scheduling loop down while the stream is held back by backpressure.

Ray 2.60 polls without a pause for outputs that are ready but may not be read yet. Beside training on two cores that took half a
core.
"""

from __future__ import annotations

import time
from typing import Any

from apprentice.data.compat import ExecutionCallback, has_output_backpressure

PAUSE_S = 0.05  # seconds a turn; rows are ready long before a training step wants them


class BackpressurePause(ExecutionCallback):
    """Sleeps `PAUSE_S` after each turn of the loop in which an operator's output was under backpressure."""

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data in each turn of its loop."""
        if has_output_backpressure(executor):
            time.sleep(PAUSE_S)
