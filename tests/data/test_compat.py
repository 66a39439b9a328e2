"""Ray Data's private API is as `apprentice.data.compat` read it; where this fails, read Ray's new version and mend that module."""

from __future__ import annotations

import inspect
from dataclasses import fields

import ray
from ray.data import DataContext
from ray.data._internal.execution.interfaces import ExecutionOptions, PhysicalOperator
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from apprentice.data.compat import ExecutionCallback, has_output_backpressure


def test_it_was_read_in_this_version() -> None:
    assert ray.__version__.rsplit(".", 1)[0] == "2.60"


def test_the_loop_calls_back_with_its_executor() -> None:
    assert [*inspect.signature(ExecutionCallback.on_execution_step).parameters] == ["self", "executor"]
    assert "custom_execution_callback_classes" in {field.name for field in fields(DataContext)}


def test_operators_say_whether_their_output_is_held_back() -> None:
    context = DataContext.get_current()
    executor = StreamingExecutor(context)
    first = PhysicalOperator("first", [], context)
    executor._topology = {first: None}
    assert not has_output_backpressure(executor)
    first.notify_in_task_output_backpressure(True)
    assert has_output_backpressure(executor)
    assert hasattr(ExecutionOptions(), "preserve_order")
