"""Memory that runs out on one of two workers under Ray Train: both go on with smaller micro-batches from the newest checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apprentice.train.distributed import driver as launch
from tests.train.distributed.test_driver import recipe, steps_of, trained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def short_of_memory(job: Any) -> None:
    """A worker function whose second worker runs out of memory in its fourth step, if it has more than two rows at once."""
    import ray.train
    import torch

    from apprentice.train.distributed import ray_worker
    from apprentice.train.engine.deepspeed import DeepSpeedEngine

    inner, steps = DeepSpeedEngine.train_step, [0]

    def train_step(self: Any, batches: Any, scale: float, rate: float) -> Any:
        steps[0] += 1
        if ray.train.get_context().get_world_rank() == 1 and steps[0] == 4 and self.micro > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return inner(self, batches, scale, rate)

    DeepSpeedEngine.train_step = train_step  # type: ignore[method-assign]
    ray_worker.work(job)


def test_micro_batches_are_halved_on_all_workers(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortage costs none of the failures that the run may have."""
    monkeypatch.setattr(launch, "work", short_of_memory)
    checkpoint = {"every_steps": 2, "keep": 3}
    made = recipe(
        tmp_path, tiny_model, training__global_batch=8, training__steps=5, training__checkpoint=checkpoint, training__max_failures=0
    )
    result, run, seen = trained(made)
    assert (result.steps, result.restarts) == (5, 1)
    first, second = ([step for step in steps_of(run) if step["attempt"] == attempt] for attempt in (1, 2))
    assert [step["step"] for step in first] == [1, 2, 3]
    assert [step["step"] for step in second] == [3, 4, 5]  # from the checkpoint of step 2
    assert second[0]["examples"] == first[-1]["examples"] != []
    assert second[0]["loss"] == pytest.approx(first[-1]["loss"], rel=1e-5)
    messages = [record["message"] for record in seen if "message" in record]
    assert any("4 rows at once" in message for message in messages)
    assert any(
        "a worker ran out of memory with 4 rows at once; training goes on from its newest" in message for message in messages
    )
    assert any("2 rows at once" in message for message in messages)
