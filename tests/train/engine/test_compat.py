"""The private API of DeepSpeed that we use is still that of the release in which it was read."""

from __future__ import annotations

import copy
import inspect
import re
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from apprentice.train.engine import compat


def test_deepspeed_is_the_release_that_was_read() -> None:
    assert version("deepspeed") == compat.READ_IN_VERSION, "read engine/compat.py against the new release, then raise its version"


def test_deepspeed_still_has_what_we_use() -> None:
    compat.import_deepspeed(torch.device("cpu"))
    from deepspeed.ops import __compatible_ops__
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.tensor_fragment import tensor_fragment

    classes = (DeepSpeedZeroOptimizer_Stage3, DeepSpeedZeroOptimizer, BF16_Optimizer)
    for name, optimizer in zip(compat.MASTER_WEIGHTS, classes, strict=True):
        assert f"self.{name} = []" in inspect.getsource(optimizer)
    assert list(inspect.signature(DeepSpeedZeroOptimizer_Stage3._get_fp32_opt_state_partition).parameters) == [
        "self",
        "param",
        "release_swap_buffers",
        "optim_state_key",
    ]
    assert list(inspect.signature(tensor_fragment.get_hp_fragment).parameters) == ["self", "optim_state_key"]
    assert list(inspect.signature(DeepSpeedZeroOptimizer_Stage3._get_fp32_opt_state_partition).parameters) == [
        "self",
        "param",
        "release_swap_buffers",
        "optim_state_key",
    ]
    for name in ("_swappable_optimizer_subgroup", "_optimizer_states_and_gradient_swap_out"):
        assert callable(getattr(DeepSpeedZeroOptimizer_Stage3, name))
    step = inspect.getsource(DeepSpeedZeroOptimizer_Stage3)
    assert all(f"self.{name}(" in step for name in ("_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters"))
    assert "self.persistent_parameters[0].all_gather(" in step
    assert not hasattr(DeepSpeedZeroOptimizer_Stage3, "update_lp_params")
    for optimizer in (DeepSpeedZeroOptimizer, BF16_Optimizer):
        assert list(inspect.signature(optimizer.update_lp_params).parameters) == ["self"]
    assert {"lp_fragment_address"} <= set(inspect.signature(tensor_fragment).parameters)
    for optimizer in (DeepSpeedZeroOptimizer, BF16_Optimizer):
        assert "self._hp_optimizer_states_linked" in inspect.getsource(optimizer._lazy_init_hp_params_optimizer_state)
    assert not hasattr(DeepSpeedZeroOptimizer_Stage3, "_lazy_init_hp_params_optimizer_state")
    source = inspect.getsource(partition_parameters)
    assert all(f".{name}" in source for name in ("ds_id", "ds_tensor.ds_numel", "ds_numel_aligned", "ds_shape"))
    assert all(f"self.{name} = " in source for name in ("remote_device", "local_device", "pin_memory"))
    # What a split parameter of ours must have too, before it is partitioned for the first time.
    first = source[source.index("def _partition_param(") : source.index("def _partition_param_sec(")]
    assert set(re.findall(r"^ +param\.ds_tensor\.(\w+) = ", first, re.MULTILINE)) == {"ds_numel", "status", "final_location"}
    assert set(re.findall(r"^ +param\.(ds_\w+) = ", first, re.MULTILINE)) == {"ds_tensor", "ds_numel_aligned"}
    scaler = DynamicLossScaler(8.0, scale_window=2, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False)
    assert set(compat.LOSS_SCALER_STATE) <= set(vars(scaler))
    assert "deepspeed_shm_comm" in __compatible_ops__


def test_copies_of_a_module_made_meanwhile_gather_nothing_later(monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    gathered = SimpleNamespace(__enter__=lambda: events.append("gather"), __exit__=lambda *_: events.append("split"))
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=lambda _: gathered)))
    head = nn.Linear(2, 1)
    head.weight.ds_id = 0  # type: ignore[assignment]
    hooks = compat.GatherOnUse(head)
    head(torch.zeros(2))
    assert events == ["gather", "split"]
    copied = copy.deepcopy(head)  # as peft does with the output layer of a reward model
    hooks.remove()
    head(torch.zeros(2))
    copied(torch.zeros(2))
    assert events == ["gather", "split"]
