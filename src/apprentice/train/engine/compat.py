"""Private API of DeepSpeed, read in version 0.19.8. tests/train/engine/test_compat.py fails when another release changes it.

DeepSpeed publishes how to read and set whole tensors (`safe_get_full_fp32_param` and its like), which gathers every tensor on every
worker. Each worker's own shard, the float32 tensors that ZeRO updates, and the loss scaler have no public name:

    stage 3    parameter.ds_id, .ds_tensor.ds_numel   the parameter is partitioned into parts of equal size, the last ones padded
               parameter._z3_optimizer                reads and finds this worker's part of the weight or of a moment, in float32
               Init._convert_to_deepspeed_param       makes a parameter one that is partitioned; its part is ds_tensor
    stage 1-2  parameter._hp_mapping                  this worker's fragment of the parameter; None where it has none
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

READ_IN_VERSION = "0.19.8"
# The float32 tensors that the optimizer updates: stage 3, stages 1 and 2, bfloat16 without ZeRO.
MASTER_WEIGHTS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def import_deepspeed(device: torch.device) -> Any:
    """Imports DeepSpeed for `device`, with its warnings and logs turned down and without what it compiles for nothing."""
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


def zero_init(config: Mapping[str, Any]) -> Any:
    """DeepSpeed's `zero.Init` for `config`, with which `split_parameter` splits. All workers must call it.

    It is not entered as a context: that would allocate each parameter whole, and send it from the first worker to the others.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.init_distributed(get_accelerator().communication_backend_name(), dist_init_required=False)
    return deepspeed.zero.Init(config_dict_or_path=dict(config))


def split_parameter(init: Any, parameter: nn.Parameter, fill: Callable[[int, Tensor], None]) -> None:
    """Makes `parameter` one that ZeRO-3 has partitioned; `fill(start, out)` gives a range of its flattened values.

    Only this worker's part of it is asked for, and only that part has memory then. All workers must call it in the same order.
    """
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

    numbers = parameter.numel()
    init._convert_to_deepspeed_param(parameter)
    split: Any = parameter
    size = split.aligned_size() // split.ds_zero_partition_world_size
    part: Any = torch.zeros(size, dtype=parameter.dtype, device=init.remote_device)
    if init.pin_memory and part.device.type == "cpu":
        part = part.pin_memory()
    start = min(split.ds_zero_partition_rank * size, numbers)
    fill(start, part[: min(size, numbers - start)])
    part.ds_numel, part.status, part.final_location = size, PartitionedParamStatus.AVAILABLE, None
    split.ds_tensor, split.ds_numel_aligned = part, split.aligned_size()
    split.partition()  # frees what the parameter itself has
    parameter.data = parameter.data.to(init.local_device)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of a parameter, which ZeRO-3 empties when it partitions it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def is_split(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has partitioned `parameter`."""
    return hasattr(parameter, "ds_id")


def cast_unsplit(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts to `dtype` the parameters that were added to a split model; DeepSpeed casts those of a model that is not split."""
    parameters = list(model.parameters())
    if any(is_split(parameter) for parameter in parameters):
        for parameter in parameters:
            if not is_split(parameter) and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


class GatherOnUse:
    """Hooks that gather the partitioned parameters of each module of `model` while it runs, for passes before there is an engine.

    They serve forward passes without gradients. All workers must run the same ones. A copy of a module that is made meanwhile, as
    peft makes one of a new output layer, keeps its hooks, which do nothing after `remove`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._handles: list[Any] = []
        self._is_on = True
        for module in model.modules():
            own = [parameter for parameter in module.parameters(recurse=False) if is_split(parameter)]
            if own:
                self._add_hooks(module, own)

    def _add_hooks(self, module: nn.Module, parameters: list[nn.Parameter]) -> None:
        import deepspeed

        gathered: Any = deepspeed.zero.GatheredParameters(parameters)

        def gather(*_: Any) -> None:
            if self._is_on:
                gathered.__enter__()

        def split(*_: Any) -> None:
            if self._is_on:
                gathered.__exit__(None, None, None)

        self._handles += [
            module.register_forward_pre_hook(gather),
            module.register_forward_hook(split, always_call=True),
        ]

    def remove(self) -> None:
        """Takes the hooks away."""
        self._is_on = False
        for handle in self._handles:
            handle.remove()


class LocalShard(NamedTuple):
    """One worker's part of a flattened tensor: `numel` elements from `start`.

    `read()` gives them, float32 (numel,); `update(change)` has `change` set what it gives in place.
    """

    start: int
    numel: int
    read: Callable[[], Tensor]
    update: Callable[[Callable[[Tensor], object]], object]


def local_shard(parameter: nn.Parameter, moment: str | None, numbers: int, rank: int) -> LocalShard:
    """This worker's shard of a ZeRO-partitioned parameter's weight, or of its optimizer `moment`, which has `numbers` elements.

    It reads and updates DeepSpeed's own tensors, which the next step changes.
    """
    partitioned: Any = parameter
    if hasattr(parameter, "ds_id"):
        part = partitioned.ds_tensor.ds_numel
        start = min(rank * part, numbers)
        count = min(part, numbers - start)
        zero = partitioned._z3_optimizer

        def find(*, release: bool) -> tuple[Tensor, int]:
            partition, group = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=release, optim_state_key=moment)
            return partition.detach()[:count], group

        def update(change: Callable[[Tensor], object]) -> None:
            values, group = find(release=False)
            change(values)
            if zero._swappable_optimizer_subgroup(group):
                zero._optimizer_states_and_gradient_swap_out(group)

        return LocalShard(start, count, lambda: find(release=True)[0], update)
    fragment = partitioned._hp_mapping
    if fragment is None:
        return LocalShard(0, 0, lambda: torch.empty(0), lambda _: None)
    address = fragment.lp_fragment_address

    def find_fragment() -> Tensor:
        values: Tensor = fragment.get_hp_fragment(moment).detach()
        return values

    def update_fragment(change: Callable[[Tensor], object]) -> None:
        change(find_fragment())

    return LocalShard(address.start, address.numel, find_fragment, update_fragment)


def update_compute_weights(optimizer: Any) -> None:
    """Sets the weights that a forward pass uses from the float32 ones, as at the end of a step. All workers must call it.

    `optimizer` is DeepSpeed's, of ZeRO.
    """
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def gather_at_once(modules: Iterable[nn.Module]) -> None:
    """Has ZeRO-3 gather all parameters in one of `modules` when it is called, and not those of each inner module that is called."""
    from deepspeed.utils import set_z3_leaf_module

    for module in modules:
        set_z3_leaf_module(module, True)


def master_weights(optimizer: Any) -> list[Tensor] | None:
    """The float32 tensors, flat, that `optimizer` (DeepSpeed's) updates; None where it updates the parameters themselves."""
    for name in MASTER_WEIGHTS:
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return None


def link_optimizer_state(optimizer: Any) -> None:
    """Tells ZeRO where each parameter's part of the optimizer's state lies.

    DeepSpeed does this itself after it has stepped the first parameter group, when the state of the others does not exist yet.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def loss_scaler_state(optimizer: Any) -> dict[str, float]:
    """State of float16's dynamic loss scaler."""
    scaler = optimizer.loss_scaler
    return {name: getattr(scaler, name) for name in LOSS_SCALER_STATE if hasattr(scaler, name)}


def set_loss_scaler_state(optimizer: Any, state: Mapping[str, float]) -> None:
    """Sets the state that `loss_scaler_state` gave; keys that are missing keep their value."""
    for name in LOSS_SCALER_STATE:
        if name in state:
            setattr(optimizer.loss_scaler, name, state[name])


def has_overflowed(optimizer: Any) -> bool:
    """Whether the last float16 step overflowed, so that it was skipped and the loss scale lowered."""
    return bool(getattr(optimizer, "overflow", False))
