"""The pace of Ray Data's loop while the stream is as far ahead of training as it may be.

Ray 2.60 asks anew, without a pause, for rows that are ready and may not be read yet. Beside training on two cores that took half a
core. Knows nothing of what flows through the stream.
"""

from __future__ import annotations

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

REST_S = 0.05  # rows are ready long before a training step wants them


class Pace(ExecutionCallback):
    """Lets the loop rest after a turn in which a stage had to hold rows back."""

    def on_execution_step(self, executor: Any) -> None:
        if any(operator._in_task_output_backpressure for operator in executor._topology):
            time.sleep(REST_S)
