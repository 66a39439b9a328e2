"""DeepSpeed engine behind a small interface: an optimizer step, a validation pass, and the training state by parameter name.

The state is the float32 weights and the optimizer's moments. It is saved from each worker's shards and restored from whole tensors,
by parameter name, so that a checkpoint means the same on any number of workers and at any ZeRO stage.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apprentice.models.tuning.methods import count_trainable
from apprentice.recipe import Training
from apprentice.train.batch import Micro
from apprentice.train.checkpoint.shard_gather import Shard
from apprentice.train.engine.deepspeed_config import deepspeed_config
from apprentice.train.losses.registry import loss_of
from apprentice.train.losses.sft import TargetLoss
from apprentice.train.optimizer import moments, optimizer_of
from apprentice.train.state import StepOutcome

WEIGHT = "weight"
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # state of DeepSpeed's dynamic loss scaler


class DeepSpeedEngine:
    """DeepSpeed around `model` and its loss on `device`, in each of `workers` processes of one torch.distributed group.

    `micro` is the number of packed rows in a micro-batch; `dtype` the number format to multiply in, whatever that of the weights.
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
    ) -> None:
        deepspeed = _deepspeed(device)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        numbers = sum(parameter.numel() for parameter in trained.values())
        weights = next(iter(trained.values())).dtype if training.optimizer.name == "adafactor" else dtype
        config = deepspeed_config(training, workers=workers, micro=micro, dtype=weights, trainable=numbers)
        if training.activation_checkpointing:
            checkpointing(model)
        self._loss_module = loss_of(model, training, None if weights == dtype else dtype)
        wrapped = _Module(self._loss_module).to(device=device)
        self.trained = count_trainable(model)  # number of trained parameters, and their share of all
        self.attention = str(getattr(getattr(model, "config", None), "_attn_implementation", "eager"))
        self.micro = micro
        self._optimizer = training.optimizer.name
        self._scales_loss = weights == torch.float16
        self._shapes = {name: parameter.shape for name, parameter in trained.items()}  # ZeRO-3 empties the parameters
        # DeepSpeed warns of its own use of PyTorch and prints the memory it uses: nothing a user can act on.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            self._engine = deepspeed.initialize(
                model=wrapped, optimizer=optimizer_of(trained, training.optimizer), config=config, dist_init_required=False
            )[0]
        self._parameters = trained  # DeepSpeed keeps the parameter objects and swaps their data
        self._device = device
        self._rank = dist.get_rank()

    def train_step(self, micros: Sequence[Micro], scale: float, rate: float) -> StepOutcome:
        """One optimizer step with learning rate `rate`, on the loss of `micros` summed over all workers and times `scale`.

        All workers must give equally many micro-batches.
        """
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        nll = torch.zeros((), dtype=torch.float64)
        norm = 0.0
        figures: Counter[str] = Counter()
        workers = self._engine.dp_world_size
        for number, micro in enumerate(micros, start=1):
            loss = self._loss(micro)
            # DeepSpeed averages gradients over the workers; times their number, the average is the sum.
            self._engine.backward(loss * (scale * workers), scale_wrt_gas=False)
            if number == len(micros) and not self._engine.zero_optimization():
                norm = self._plain_norm()
            self._engine.step()
            nll += loss.detach().double().cpu()
            figures.update({name: float(value) for name, value in self._loss_module.figures.items()})
        if self._engine.zero_optimization():
            # A float16 step that overflowed was skipped and the loss scale lowered, which is no error.
            left_out = self._scales_loss and getattr(self._engine.optimizer, "overflow", False)
            norm = 0.0 if left_out else float(self._engine.get_global_grad_norm())
        return StepOutcome(float(nll), norm, dict(figures))

    def validation_nll(self, micro: Micro) -> float:
        """Summed loss of `micro` on this worker. All workers must call it equally often, since ZeRO-3 gathers weights."""
        self._engine.eval()
        with torch.no_grad():
            return float(self._loss(micro))

    def likeliest(self, prompt: Sequence[int], reply: Sequence[int]) -> int:
        """Greedy next token id after `prompt` and the tokens of `reply` so far. All workers must call it."""
        self._engine.eval()
        with torch.no_grad():
            logits = self._engine(*(torch.tensor([list(ids)], dtype=torch.long, device=self._device) for ids in (prompt, reply)))
        return int(logits[0, -1].argmax())

    def _loss(self, micro: Micro) -> Tensor:
        there = micro.to(self._device)
        loss: Tensor = self._engine(*there.tensors)
        return loss

    def _plain_norm(self) -> float:
        norms = [parameter.grad.norm() for parameter in self._parameters.values() if parameter.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def pieces(self) -> list[Shard]:
        """This worker's shards of the state: keys `weight/<name>`, `exp_avg/<name>`, … in the same order on all workers.

        They read the engine's own tensors, so the next step changes every piece that was not copied.
        """
        if self._steps_made() == 0:  # every float16 step so far overflowed and was skipped
            self._begin_optimizer_state(0)
        self._link_optimizer_state()
        found = []
        for name, parameter in self._parameters.items():
            shapes = {None: self._shapes[name]} | moments(self._optimizer, self._shapes[name])
            for moment, shape in shapes.items():
                start, numbers, read = self._held(parameter, moment, math.prod(shape))
                found.append(Shard(f"{moment or WEIGHT}/{name}", tuple(shape), start, numbers, read))
        return found

    def _held(self, parameter: nn.Parameter, moment: str | None, numbers: int) -> tuple[int, int, Callable[[], Tensor]]:
        """This worker's shard of a parameter's weight (or `moment`) of `numbers` elements: start, length, and its reader."""
        if not self._engine.zero_optimization():  # stage 0: every worker has all, and the first one saves it
            whole = parameter if moment is None else self._plain_state(parameter)[moment]
            return 0, numbers if self._rank == 0 else 0, whole.flatten
        sharded: Any = parameter
        if hasattr(parameter, "ds_id"):  # ZeRO-3: equal parts, the last ones padded
            part = sharded.ds_tensor.ds_numel
            start = min(self._rank * part, numbers)
            count = min(part, numbers - start)
            return start, count, lambda: sharded._z3_optimizer.get_local_fp32_param(parameter, moment)[:count]
        held = sharded._hp_mapping
        if held is None:
            return 0, 0, lambda: torch.empty(0)
        address = held.lp_fragment_address
        return address.start, address.numel, lambda: held.get_hp_fragment(moment)

    def loss_scaling(self) -> dict[str, float] | None:
        """State of float16's loss scaler, and `steps`, the number of steps not skipped; None for other number formats."""
        if not self._scales_loss:
            return None
        scaler = self._engine.optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)} | {"steps": self._steps_made()}

    def restore(self, read: Callable[[str], Tensor], steps: int, scaling: Mapping[str, float] | None = None) -> None:
        """Restores the state: `read(key)` gives a whole tensor, `steps` is the number of optimizer steps made.

        `scaling` is the result of `loss_scaling`; without it the loss scale starts anew.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if scaling is not None and self._scales_loss:
            steps = int(scaling["steps"])
            for name in SCALER:
                if name in scaling:
                    setattr(self._engine.optimizer.loss_scaler, name, scaling[name])
        self._begin_optimizer_state(steps)
        sharded = self._engine.zero_optimization()
        for name, parameter in self._parameters.items():
            weight = read(f"{WEIGHT}/{name}").to(self._device)
            if sharded:
                safe_set_full_fp32_param(parameter, weight)
            else:
                parameter.data.copy_(weight)
            for key in moments(self._optimizer, self._shapes[name]):
                moment = read(f"{key}/{name}").to(self._device)
                if sharded:
                    safe_set_full_optimizer_state(parameter, moment, key)
                else:
                    self._plain_state(parameter)[key].copy_(moment)

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
        for master in self._masters():
            inner.state[master] = {"step": torch.tensor(float(steps), device=master.device)} | {
                key: master.new_zeros(shape) for key, shape in moments(self._optimizer, master.shape).items()
            }
        self._link_optimizer_state()

    def _link_optimizer_state(self) -> None:
        """Tells ZeRO where each parameter's part of the optimizer's state lies.

        DeepSpeed does this itself after it has stepped the first parameter group, when the state of the others does not exist yet.
        """
        zero: Any = self._engine.optimizer
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _masters(self) -> list[Tensor]:
        """The float32 tensors that the optimizer updates (flat under ZeRO); each ZeRO stage has another name for them."""
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(self._engine.optimizer, name):
                return list(getattr(self._engine.optimizer, name))
        return list(self._parameters.values())


class _Module(nn.Module):
    """The module that DeepSpeed wraps: returns a micro-batch's loss or, called with (prompt, reply so far), the model's logits."""

    def __init__(self, loss: TargetLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *tensors: Tensor | None) -> Tensor:
        if len(tensors) == 2 and (prompt := tensors[0]) is not None and (reply := tensors[1]) is not None:
            return self.loss.logits_after(prompt, reply)
        result: Tensor = self.loss(*tensors)
        return result


def checkpointing(model: nn.Module) -> None:
    """Turns on activation checkpointing: `model` keeps only the input of each layer for the backward pass."""
    plain: Any = model
    plain.gradient_checkpointing_enable({"use_reentrant": False})


def _deepspeed(device: torch.device) -> Any:
    """Imports DeepSpeed for `device`, with its warnings and logs turned down."""
    os.environ["DS_ACCELERATOR"] = device.type
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.ops import __compatible_ops__
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a CPU DeepSpeed would compile a shared-memory reduction that only inference uses: half a minute of g++.
    __compatible_ops__["deepspeed_shm_comm"] = False
    # To check an optimizer's type DeepSpeed imports Muon, and with it PyTorch's compiler: 1.5 s for nothing.
    with patch.object(torch, "compile", lambda function, **_: function), contextlib.suppress(ImportError):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    return deepspeed
