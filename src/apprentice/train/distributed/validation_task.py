"""Ray task that validates checkpoints while training goes on (Ray Train's asynchronous validation).

The computation itself is in async_validation.py. A checkpoint whose validation was cut off, because the run was stopped or a node
lost, stays marked as awaited and is validated at the end of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import ValidationConfig

from apprentice.recipe.training import Resources
from apprentice.run.folder import Run

if TYPE_CHECKING:  # it imports models, which Ray Train's controller does not need
    from apprentice.train.checkpoint.format import Checkpoint
    from apprentice.train.distributed.async_validation import CheckpointValidator

Told = Callable[[int, dict[str, Any]], Any]  # gets the checkpoint's step and figures of its validation


class Validation:
    """Runs `aside` on checkpoints of `run`, each in a Ray task with `resources` of its own."""

    def __init__(self, aside: CheckpointValidator, run: Run, resources: Resources) -> None:
        self._aside = ray.put(aside)
        self._run = run
        self._resources: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}

    def config(self, mailbox: Any) -> ValidationConfig:
        """Ray Train's configuration; the figures go to `mailbox`."""

        def validate(checkpoint: ray.train.Checkpoint, **_: Any) -> dict[str, Any]:
            tell: Told = mailbox.add_validation.remote
            return {"validation_loss": self._validated(PurePosixPath(checkpoint.path).name, tell)}

        return ValidationConfig(fn=validate, ray_remote_kwargs=self._resources)

    def catch_up(self, told: Told) -> None:
        """Validates all checkpoints still awaited, oldest first. Raises the error of a validation that fails."""

        def validate(name: str) -> list[tuple[int, dict[str, Any]]]:
            figures: list[tuple[int, dict[str, Any]]] = []
            self._validated(name, lambda *told: figures.append(told))
            return figures

        from apprentice.train.checkpoint import format as checkpoints

        for found in checkpoints.find_awaiting_validation(self._run.checkpoints):
            name = PurePosixPath(str(found.folder)).name
            for step, figures in ray.get(ray.remote(validate).options(**self._resources, max_retries=0).remote(name)):
                told(step, figures)

    def _validated(self, name: str, told: Told) -> float | None:
        """Validation loss of the checkpoint in this folder; None without validation rows, or if the checkpoint was pruned."""
        from apprentice.train.checkpoint import format as checkpoints

        with checkpoints.mark_in_use(self._run.checkpoints / name):
            found = checkpoints.find_named(self._run.checkpoints, name)
            return None if found is None else self._validate(found, told)

    def _validate(self, found: Checkpoint, told: Told) -> float | None:
        from apprentice.train.checkpoint import format as checkpoints

        def tell(figures: dict[str, Any]) -> None:
            if "validation_loss" in figures:
                checkpoints.record_validation(found, figures["validation_loss"])
            told(found.state.step, figures)

        aside: CheckpointValidator = ray.get(self._aside)
        loss = aside(found, tell, on_gpu=self._resources["num_gpus"] > 0)
        if loss is None:
            checkpoints.record_validation(found, None)
        return loss
