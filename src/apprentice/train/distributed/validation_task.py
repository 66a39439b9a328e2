"""Ray task that validates checkpoints while training goes on (Ray Train's asynchronous validation).

The computation itself is in async_validation.py. A checkpoint whose validation was cut off, because the run was stopped or a node
lost, stays marked as awaited and is validated at the end of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import ValidationConfig

from apprentice.errors import DamagedError
from apprentice.pretrained.hub import local_folder
from apprentice.recipe import Recipe
from apprentice.recipe.training import Resources
from apprentice.run.folder import Run

if TYPE_CHECKING:  # it imports models, which Ray Train's controller does not need
    from apprentice.train.checkpoint.format import Checkpoint
    from apprentice.train.distributed.async_validation import CheckpointValidator

ReportFigures = Callable[[int, dict[str, Any]], Any]  # gets the checkpoint's step and figures of its validation


class ValidationTask:
    """Runs `validator` on checkpoints of `run`, each in a Ray task with `resources` of its own, and memory for the model.

    Raises `ResourcesError` where no node has as much memory.
    """

    def __init__(self, validator: CheckpointValidator, run: Run, resources: Resources) -> None:
        self._validator = ray.put(validator)
        self._run = run
        self._resources: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
        self._resources["memory"] = _memory(validator.recipe)

    def config(self, mailbox: Any) -> ValidationConfig:
        """Ray Train's configuration; the figures go to `mailbox`."""

        def validate(checkpoint: ray.train.Checkpoint, **_: Any) -> dict[str, Any]:
            report: ReportFigures = mailbox.add_validation.remote
            return {"validation_loss": self._validate(PurePosixPath(checkpoint.path).name, report)}

        return ValidationConfig(fn=validate, ray_remote_kwargs=self._resources)

    def validate_awaiting(self, report: ReportFigures) -> None:
        """Validates all checkpoints whose validation is not done, oldest first. Raises the error of a validation that fails."""

        def validate(name: str) -> list[tuple[int, dict[str, Any]]]:
            figures: list[tuple[int, dict[str, Any]]] = []
            self._validate(name, lambda *step_and_figures: figures.append(step_and_figures))
            return figures

        from apprentice.train.checkpoint import format as checkpoints

        for checkpoint in checkpoints.find_awaiting_validation(self._run.checkpoints):
            name = PurePosixPath(str(checkpoint.folder)).name
            for step, figures in ray.get(ray.remote(validate).options(**self._resources, max_retries=0).remote(name)):
                report(step, figures)

    def _validate(self, name: str, report: ReportFigures) -> float | None:
        """Validation loss of the checkpoint in this folder; None without validation rows, or if it was pruned or is damaged."""
        from apprentice.train.checkpoint import format as checkpoints

        with checkpoints.mark_in_use(self._run.checkpoints / name):
            checkpoint = checkpoints.find_named(self._run.checkpoints, name)
            with suppress(DamagedError):  # it is marked so, and passed over from now on
                return None if checkpoint is None else self._validate_checkpoint(checkpoint, report)
            return None

    def _validate_checkpoint(self, checkpoint: Checkpoint, report: ReportFigures) -> float | None:
        from apprentice.train.checkpoint import format as checkpoints

        def record_and_report(figures: dict[str, Any]) -> None:
            if "validation_loss" in figures:
                checkpoints.record_validation(checkpoint, figures["validation_loss"])
            report(checkpoint.state.step, figures)

        validator: CheckpointValidator = ray.get(self._validator)
        loss = validator(checkpoint, record_and_report, on_gpu=self._resources["num_gpus"] > 0)
        if loss is None:
            checkpoints.record_validation(checkpoint, None)
        return loss


def _memory(recipe: Recipe) -> int | None:
    """Ray's option `memory` for a task that holds the recipe's model."""
    from apprentice.model_pool.actors import reserve_memory  # imports PyTorch, which Ray Train's controller does not need
    from apprentice.model_pool.model import weight_bytes

    resources = recipe.training.resources
    weights = weight_bytes(local_folder(recipe.model.base), recipe.model.dtype, gpu=resources.gpus > 0)
    return reserve_memory(weights, "the validation of a checkpoint", cpus=resources.cpus, gpus=resources.gpus)
