"""Devices, models and measures of the tests in this folder.

Nearly every test runs twice: on a GPU with `pytest -m gpu`, and on the CPU, in a smaller size, with the quick tests (those of the
engine by hand, with `-m long`), so that most lines have been run before a GPU is at hand. Only losses, models and the engine are
imported: neither Ray nor the data pipeline.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apprentice.models.attention.backend_choice import PackedCompute
from apprentice.models.loading import load_model
from apprentice.train.batch import MicroBatch, PackedRows, move_batch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def on_devices(*cpu_marks: Any) -> Any:
    """Parametrises a test by `device`; `cpu_marks` are for the CPU alone."""
    return pytest.mark.parametrize(
        "device", [pytest.param(CPU, id="cpu", marks=cpu_marks), pytest.param(GPU, id="gpu", marks=pytest.mark.gpu)]
    )


def llama(*, layers: int = 2, hidden: int = 64, inner: int = 96, vocabulary: int = 500) -> Any:
    """A Llama with heads of 32 numbers and random weights, the same every time, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = hf.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            max_position_embeddings=2**16,
        )
        return hf.LlamaForCausalLM(config)


def loaded(model: Any, folder: Path, dtype: torch.dtype, device: torch.device, attention: str = "auto") -> Any:
    """`model` as a run loads it: written into `folder`, read with the recipe's word for attention, moved to `device`."""
    model.save_pretrained(folder)
    return load_model(folder, dtype, attention, packed=PackedCompute.on(device, dtype)).to(device)


def only_batch(rows: PackedRows, device: torch.device) -> Any:
    """All rows as one micro-batch on `device`."""
    [batch] = rows.micro_batches(len(rows))
    moved: MicroBatch = move_batch(batch, device)
    return moved


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of `model` in float32 on the CPU, by parameter; takes them off the model."""
    own = {key: parameter.grad.float().cpu() for key, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return own


def check_same_direction(ours: dict[str, Tensor], reference: dict[str, Tensor], cosine: float) -> None:
    """Each gradient has at least this cosine with its reference."""
    assert ours.keys() == reference.keys() != set()
    for key, gradient in reference.items():
        similarity = torch.nn.functional.cosine_similarity(ours[key].flatten(), gradient.flatten(), dim=0)
        assert similarity >= cosine, (key, float(similarity))


class _LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, Tensor):
                self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return results


def working_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that `call()` has at once on a GPU, beside those from before it.

    On the CPU, which counts none, the bytes of its largest tensor.
    """
    if device.type == "cpu":
        with _LargestTensor() as largest:
            call()
        return largest.nbytes
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


class _HostReads(TorchDispatchMode):
    """Counts operators for which a GPU would let the host wait: reads of a value, and choices by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        by_index = function.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
        masks = [index for index in args[1] if index is not None and index.dtype == torch.bool] if by_index else []
        self.count += len(masks) + (function.overloadpacket in (aten._local_scalar_dense, aten.nonzero))
        return function(*args, **(kwargs or {}))


def count_host_waits(call: Callable[[], Any], device: torch.device) -> int:
    """How often the host waits for the device in `call()`; on the CPU, how often it would."""
    if device.type == "cpu":
        with _HostReads() as reads:
            call()
        return reads.count
    # What PyTorch says of a wait is taken from one that is known, so that another wording is still counted.
    known = _warnings_of(torch.ones((), device=device).item)
    assert len(known) == 1
    return sum(warning == known[0] for warning in _warnings_of(call))


def _warnings_of(call: Callable[[], Any]) -> list[tuple[type[Warning], str]]:
    """Kinds and texts of the warnings that PyTorch gives in `call()` when told to warn of waits."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [(warning.category, str(warning.message)) for warning in seen]
