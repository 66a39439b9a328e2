"""A callback that slows Ray Data's scheduling loop down while the stream is held back by backpressure.

Ray 2.60 polls without a pause for outputs that are ready but may not be read yet. Beside training on two cores that took half a
core.
"""

from __future__ import annotations

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

REST_S = 0.05  # seconds a turn; rows are ready long before a training step wants them


class Pace(ExecutionCallback):
    """Sleeps `REST_S` after each turn of the loop in which an operator's output was under backpressure."""

    def on_execution_step(self, executor: Any) -> None:
        if any(operator._in_task_output_backpressure for operator in executor._topology):
            time.sleep(REST_S)
