"""Asynchronous validation of a checkpoint: validation loss and held-out scores, computed while training goes on.

Ray Train runs it in a process of its own, one checkpoint after another, on resources that no worker uses. Only the validation loss
chooses the best checkpoint; held-out scores are shown only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from apprentice.errors import ApprenticeError, ResourcesError
from apprentice.model_pool.device import reserved_device
from apprentice.model_pool.host_memory import GIB, host_bytes, largest_memory
from apprentice.model_pool.model import weight_bytes
from apprentice.models.loading import resolve_dtype
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.pretrained.hub import local_folder
from apprentice.ray_cluster.autoscaler import has_autoscaler
from apprentice.recipe import Recipe
from apprentice.train.batch import MicroBatch, PackedRows, move_batch
from apprentice.train.checkpoint.format import Checkpoint
from apprentice.train.checkpoint.restore import restore_model
from apprentice.train.checkpoint.shard_reader import open_tensors
from apprentice.train.distributed.resources import has_room_for_validation
from apprentice.train.engine.collectives import Collectives
from apprentice.train.engine.deepspeed_config import choose_micro_batch
from apprentice.train.loop import compute_validation_loss
from apprentice.train.losses.loss_registry import create_loss
from apprentice.train.losses.objective_loss import ObjectiveLoss
from apprentice.train.optimizer import number_formats
from apprentice.train.packed_attention import packed_attention

Score = Callable[[Any], Mapping[str, float]]  # a model → held-out task → score


def validates_asynchronously(
    recipe: Recipe, nodes: Sequence[Mapping[str, float]], tell: Callable[[str], None] = lambda _: None
) -> bool:
    """Whether checkpoints are validated asynchronously; `nodes` are the Ray resources of each node.

    Where only memory is lacking for it, `tell` is called with a sentence, and the workers validate. Raises `ResourcesError` if the
    recipe demands it and the nodes have no room for one more worker.
    """
    training = recipe.training
    mode = training.checkpoint.validation
    if mode == "workers" or training.aim.rounds or training.sequence_parallel > 1:
        return False
    is_demanded = mode == "aside" or recipe.evaluation.while_training
    if has_room_for_validation(recipe, nodes) and (is_demanded or training.deepspeed.stage < 3):
        obstacle = None if is_demanded else _find_memory_obstacle(recipe, nodes)
        if obstacle is not None:
            tell(f"the workers validate checkpoints, and training waits meanwhile: {obstacle}")
        return obstacle is None
    if is_demanded:
        key = "training.checkpoint.validation aside" if mode == "aside" else "evaluation.while_training"
        raise ResourcesError(
            f"{key} takes the CPUs and GPUs of one more worker beside {training.max_workers}, and the cluster has no room for"
            " them; leave it out, lower training.workers, or add a node."
        )
    return False


def _find_memory_obstacle(recipe: Recipe, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Why no node has memory for the task that validates; None where one has, or an autoscaler may add it."""
    resources = recipe.training.resources
    weights = weight_bytes(local_folder(recipe.model.base), recipe.model.dtype, gpu=resources.gpus > 0)
    needed, largest = host_bytes(weights), largest_memory(nodes, cpus=resources.cpus, gpus=resources.gpus)
    if not largest or needed <= largest or has_autoscaler():
        return None
    return f"a task beside them needs {needed / GIB:.1f} GiB of memory on one node, and the largest has {largest / GIB:.1f}"


@dataclass(frozen=True)
class CheckpointValidator:
    """Validates one checkpoint: the loss over `rows`, packed rows of `length` tokens, and held-out scores where `score` is set."""

    recipe: Recipe
    rows: PackedRows
    length: int
    score: Score | None = None

    def __call__(self, checkpoint: Checkpoint, report: Callable[[dict[str, Any]], None], *, on_gpu: bool) -> float | None:
        """Returns the validation loss of `checkpoint`, None without rows; `report` gets each result as soon as it is there.

        An `ApprenticeError` from `score` becomes a message, since training does not depend on the scores.
        """
        device = torch.device(reserved_device(on_gpu))
        if not on_gpu:
            torch.set_num_threads(max(1, int(self.recipe.training.resources.cpus)))
        formats = number_formats(self.recipe.training.optimizer, resolve_dtype(checkpoint.facts["dtype"]))
        with open_tensors(checkpoint) as reader:
            model = restore_model(self.recipe, reader.read, formats.weights).eval().to(device)
        with packed_attention(model, self.recipe.model.attention, device, formats.autocast or formats.weights):
            loss = self._loss(model, formats.autocast, device)
        if loss is not None:
            report({"validation_loss": loss})
        if self.score is not None:
            try:
                scores = dict(self.score(self._merge(model)))
                report({"held_out": fmean(scores.values()), "held_out_tasks": scores})
            except ApprenticeError as error:
                report({"message": f"the held-out tasks were not scored: {error}"})
        return loss

    def _loss(self, model: nn.Module, autocast: torch.dtype | None, device: torch.device) -> float | None:
        training = self.recipe.training
        micro = choose_micro_batch(training, workers=training.max_workers, length=self.length, on_gpu=device.type != "cpu")
        engine = _LossEngine(create_loss(model, training, autocast).eval(), device)
        return compute_validation_loss(engine, self.rows, micro, Collectives())

    def _merge(self, model: Any) -> Any:
        """The model as an export would have it: adapters merged where the method can be merged."""
        merge = TUNING_METHODS[self.recipe.tuning.method].merge
        return model if merge is None else merge(model)


@dataclass(frozen=True)
class _LossEngine:
    """Validation loss without a DeepSpeed engine, for `compute_validation_loss`."""

    loss: ObjectiveLoss
    device: torch.device

    def validation_nll(self, batch: MicroBatch) -> float:
        with torch.no_grad():
            return float(self.loss(move_batch(batch, self.device)))
