"""DeepSpeed engine behind a small interface: an optimizer step, a validation pass, and the training state by parameter name.

The state is the float32 weights and the optimizer's moments. Each worker saves its shards of it, and restores them from ranges of a
checkpoint's tensors, by parameter name, so that a checkpoint means the same on any number of workers and at any ZeRO stage.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apprentice.models.acceleration.kernels import has_liger
from apprentice.models.tuning.experts import modules_used_as_one
from apprentice.recipe import Training
from apprentice.train.batch import MicroBatch, SupervisedBatch, move_batch
from apprentice.train.checkpoint.format import WEIGHT
from apprentice.train.checkpoint.shard import RangeReader, Shard, TensorRange, check_shapes
from apprentice.train.compat import attention_name
from apprentice.train.engine import compat
from apprentice.train.engine.activation_checkpointing import enable_activation_checkpointing
from apprentice.train.engine.deepspeed_config import deepspeed_config
from apprentice.train.engine.sequence_group import SequenceGroup
from apprentice.train.losses.loss_registry import create_loss
from apprentice.train.losses.objective_loss import ObjectiveLoss
from apprentice.train.optimizer import (
    begin_state,
    make_optimizer,
    moment_shapes,
    number_formats,
    read_moment,
    set_learning_rate,
    write_moment,
)
from apprentice.train.state import StepOutcome


class DeepSpeedEngine:
    """DeepSpeed around `model` and its loss on `device`, in each of `workers` processes of one torch.distributed group.

    `micro` is the number of packed rows in a micro-batch; `dtype` the number format to multiply in, whatever that of the weights.
    With `sequence_group` its workers share rows: all are given the same micro-batches, and each has a part of their loss.
    """

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        *,
        dtype: torch.dtype,
        workers: int,
        micro: int,
        device: torch.device,
        sequence_group: SequenceGroup | None = None,
    ) -> None:
        deepspeed = compat.import_deepspeed(device)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        numbers = sum(compat.whole_shape(parameter).numel() for parameter in trained.values())
        total = sum(compat.whole_shape(parameter).numel() for parameter in model.parameters())
        formats = number_formats(training.optimizer, dtype)
        config = deepspeed_config(training, workers=workers, micro=micro, dtype=formats.weights, trainable=numbers)
        enable_activation_checkpointing(model, training.activation_checkpointing)
        self._sequence_group = sequence_group
        group = None if sequence_group is None else sequence_group.devices
        self._loss_module = create_loss(model, training, formats.autocast, group=group)
        self._load_dtypes = {name: parameter.dtype for name, parameter in trained.items()}
        compat.cast_unsplit(model, formats.weights)
        compat.gather_at_once(modules_used_as_one(model))
        wrapped = _Module(self._loss_module).to(device=device)
        self.trained = numbers, numbers / max(total, 1)  # number of trained parameters, and their share of all
        self.attention = attention_name(model)
        self.has_liger = has_liger(model)
        self.micro = micro
        self._optimizer_settings = training.optimizer
        self._is_compiled = training.compile
        self._scales_loss = formats.weights == torch.float16
        self._shapes = {name: compat.whole_shape(parameter) for name, parameter in trained.items()}
        # DeepSpeed warns of its own use of PyTorch and prints the memory it uses: nothing a user can act on.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            self._engine = deepspeed.initialize(
                model=wrapped, optimizer=make_optimizer(trained, training.optimizer), config=config, dist_init_required=False
            )[0]
        self._parameters = trained  # DeepSpeed keeps the parameter objects and swaps their data
        self._device = device
        self._rank = dist.get_rank()

    def train_step(self, batches: Sequence[MicroBatch], scale: float, rate: float) -> StepOutcome:
        """One optimizer step with learning rate `rate`, on the loss of `batches` summed over all workers and times `scale`.

        All workers must give equally many micro-batches.
        """
        self._engine.train()
        set_learning_rate(self._engine.optimizer, rate)
        # Numbers stay on the device until the step is over: reading one earlier would wait for all that is queued there.
        nll = torch.zeros((), dtype=torch.float64, device=self._device)
        norm: Tensor | float = 0.0
        figures: dict[str, Tensor] = {}
        workers = self._engine.dp_world_size
        for number, batch in enumerate(batches, start=1):
            loss = self._loss(batch)
            # DeepSpeed averages gradients over the workers; times their number, the average is the sum.
            self._engine.backward(loss * (scale * workers), scale_wrt_gas=False)
            if number == len(batches) and not self._engine.zero_optimization():
                norm = self._plain_norm()
            self._engine.step()
            nll += loss.detach().double()
            figures = {name: value + figures.get(name, 0.0) for name, value in self._loss_module.figures.items()}
        if self._engine.zero_optimization():
            # A float16 step that overflowed was skipped and the loss scale lowered, which is no error.
            is_skipped = self._scales_loss and compat.has_overflowed(self._engine.optimizer)
            norm = 0.0 if is_skipped else self._engine.get_global_grad_norm()
        return StepOutcome(float(nll), float(norm), {name: float(value) for name, value in figures.items()})

    def validation_nll(self, batch: MicroBatch) -> float:
        """Summed loss of `batch` on this worker. All workers must call it equally often, since ZeRO-3 gathers weights."""
        self._engine.eval()
        with torch.no_grad():
            return float(self._loss(batch))

    def likeliest(self, prompt: Sequence[int], reply: Sequence[int]) -> int:
        """Greedy next token id after `prompt` and the tokens of `reply` so far. All workers must call it."""
        self._engine.eval()
        # Every text has a length of its own, for which compiled layers would be compiled once more.
        eagerly = torch.compiler.set_stance("force_eager") if self._is_compiled else contextlib.nullcontext()
        with torch.no_grad(), eagerly:
            texts = [torch.tensor([list(ids)], dtype=torch.long, device=self._device) for ids in (prompt, reply)]
            logits = self._engine(texts=texts)
        return int(logits[0, -1].argmax())

    def _loss(self, batch: MicroBatch) -> Tensor:
        if self._sequence_group is not None and isinstance(batch, SupervisedBatch):
            batch = self._sequence_group.part(batch)
        loss: Tensor = self._engine(batch=move_batch(batch, self._device))
        return loss

    def _plain_norm(self) -> Tensor:
        norms = [parameter.grad.norm() for parameter in self._parameters.values() if parameter.grad is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def shards(self) -> list[Shard]:
        """This worker's shards of the state: keys `weight/<name>`, `exp_avg/<name>`, … in the same order on all workers.

        They read the engine's own tensors, so the next step changes every shard that was not copied.
        """
        if self._steps_made() == 0:  # every float16 step so far overflowed and was skipped
            self._begin_optimizer_state(0)
        compat.link_optimizer_state(self._engine.optimizer)
        shards = []
        for key, shape, local in self._local_state():
            if not self._engine.zero_optimization():  # every worker has all, and each saves an equal part of it
                first, last = (local.numel * rank // dist.get_world_size() for rank in (self._rank, self._rank + 1))
                local = local._replace(start=first, numel=last - first, read=partial(_read_part, local.read, first, last))
            shards.append(Shard(key, shape, local.start, local.numel, local.read))
        return shards

    def weight_shards(self) -> list[Shard]:
        """This worker's shards of the weights alone, in the number formats in which such a model is loaded."""
        dtypes = {f"{WEIGHT}/{name}": dtype for name, dtype in self._load_dtypes.items()}
        return [replace(shard, dtype=dtypes[shard.key]) for shard in self.shards() if shard.key in dtypes]

    def _local_state(self) -> Iterator[tuple[str, tuple[int, ...], compat.LocalShard]]:
        """Key, shape and this worker's part of every tensor of the state, in the same order on all workers."""
        for name, parameter in self._parameters.items():
            shapes = {None: self._shapes[name]} | moment_shapes(self._optimizer_settings, self._shapes[name])
            for moment, shape in shapes.items():
                local = self._local_shard(parameter, moment, math.prod(shape))
                yield f"{moment or WEIGHT}/{name}", tuple(shape), local

    def _local_shard(self, parameter: nn.Parameter, moment: str | None, numbers: int) -> compat.LocalShard:
        if self._engine.zero_optimization():
            local = compat.local_shard(parameter, moment, numbers, self._rank)
        else:
            whole = (parameter.data if moment is None else self._plain_state(parameter)[moment]).view(-1)
            local = compat.LocalShard(0, numbers, lambda: whole, lambda change: change(whole))
        read, inner = local.read, self._inner_optimizer()
        return local if moment is None else local._replace(read=lambda: read_moment(inner, read()))

    def loss_scaling(self) -> dict[str, float] | None:
        """State of float16's loss scaler, and `steps`, the number of steps not skipped; None for other number formats."""
        if not self._scales_loss:
            return None
        return compat.loss_scaler_state(self._engine.optimizer) | {"steps": self._steps_made()}

    def restore(self, tensors: RangeReader, steps: int, scaling: Mapping[str, float] | None = None) -> None:
        """Restores the state from this worker's ranges of `tensors`, and from it the weights that forward passes use.

        `steps` is the number of optimizer steps made. `scaling` is the result of `loss_scaling`; without it the loss scale starts
        anew. All workers must call it. Raises `ModelError` if the tensors do not belong to this model.
        """
        if scaling is not None and self._scales_loss:
            steps = int(scaling["steps"])
            compat.set_loss_scaler_state(self._engine.optimizer, scaling)
        self._begin_optimizer_state(steps)
        state = list(self._local_state())
        check_shapes(tensors.shapes, {key: shape for key, shape, _ in state})
        ranges = [TensorRange(key, local.start, local.numel) for key, _, local in state]
        for (key, _, local), values in zip(state, tensors.read_ranges(ranges), strict=True):
            if local.numel:
                local.update(partial(self._set_values, values, is_weight=key.startswith(f"{WEIGHT}/")))
        if self._engine.zero_optimization():
            compat.update_compute_weights(self._engine.optimizer)

    def _set_values(self, values: Tensor, target: Tensor, *, is_weight: bool) -> None:
        if is_weight:
            target.copy_(values)
        else:
            write_moment(self._inner_optimizer(), target, values.to(target.device))

    def _plain_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._engine.optimizer.state[parameter]
        return state

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        zero: Any = self._engine.optimizer
        inner: torch.optim.Optimizer = zero.optimizer if self._engine.zero_optimization() else zero
        return inner

    def _steps_made(self) -> int:
        """Number of steps in the optimizer's own count."""
        return max((int(state["step"]) for state in self._inner_optimizer().state.values() if "step" in state), default=0)

    def _begin_optimizer_state(self, steps: int) -> None:
        """Creates the optimizer's state: zeros, and a count of `steps`. Optimizers do so in their first step, which is too late."""
        inner = self._inner_optimizer()
        for master in compat.master_weights(self._engine.optimizer) or self._parameters.values():
            begin_state(inner, self._optimizer_settings, master, steps)
        compat.link_optimizer_state(self._engine.optimizer)


class _Module(nn.Module):
    """The module that DeepSpeed wraps: gives a micro-batch's loss, or the model's logits for `texts`, (prompt, reply so far)."""

    def __init__(self, loss: ObjectiveLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, batch: MicroBatch | None = None, texts: Sequence[Tensor] = ()) -> Tensor:
        result: Tensor = self.loss.targets.logits_after(*texts) if batch is None else self.loss(batch)
        return result


def _read_part(read: Callable[[], Tensor], first: int, last: int) -> Tensor:
    return read()[first:last]
