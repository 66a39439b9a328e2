"""Private API of Ray Data 2.60: the callback of its scheduling loop, and the backpressure flag of its operators.

`tests/data/test_compat.py` fails where another version of Ray Data has them no more.
"""

from __future__ import annotations

from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

__all__ = ["ExecutionCallback", "has_output_backpressure"]


def has_output_backpressure(executor: Any) -> bool:
    """Whether an operator of a running `StreamingExecutor` may not hand on outputs that are ready."""
    return any(operator._in_task_output_backpressure for operator in executor._topology)
