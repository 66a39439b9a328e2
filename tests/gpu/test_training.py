"""Parts of a training on a GPU without DeepSpeed: LoRA, activation checkpointing, optimizers, the search for a micro-batch."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apprentice.models.tuning.methods import TUNING_METHODS, trainable_parameters
from apprentice.recipe import Optimizer, Tuning
from apprentice.train.batch import SupervisedBatch
from apprentice.train.engine.activation_checkpointing import enable_activation_checkpointing
from apprentice.train.losses.sft import SupervisedLoss
from apprentice.train.memory.batch_size import find_largest_fitting, fits_into_memory
from apprentice.train.memory.measure import describe_memory_in_use, peak_memory
from apprentice.train.optimizer import make_optimizer, moment_shapes, number_formats
from tests.gpu.on_devices import check_same_direction, gradients, llama, loaded, on_devices, only_batch, working_bytes
from tests.train.rows import packed_rows


@on_devices()
def test_lora_trains_its_own_weights_and_merges(device: torch.device, tmp_path: Path) -> None:
    base = loaded(llama(hidden=128), tmp_path, torch.float32, device)
    frozen = {key: parameter.detach().clone() for key, parameter in base.named_parameters()}
    method = TUNING_METHODS["lora"]
    model = method.wrap(base, Tuning(method="lora", rank=4), 0).train()
    trained, batch = trainable_parameters(model), only_batch(packed_rows(3), device)
    optimizer, loss = make_optimizer(trained, Optimizer(learning_rate=1e-2)), SupervisedLoss(model)
    before = _train(loss, batch, optimizer, 6)
    assert trained
    assert all("lora_" in key for key in trained)
    assert gradients(model).keys() == trained.keys()
    assert all(torch.equal(frozen[key], dict(base.named_parameters())[_in_lora(key, base)]) for key in frozen)
    with torch.no_grad():
        wrapped = loss(batch)
        assert method.merge is not None
        merged = SupervisedLoss(method.merge(model))(batch)
    assert wrapped < 0.95 * before[0]
    torch.testing.assert_close(merged, wrapped, rtol=1e-4, atol=0)


def _in_lora(key: str, model: Any) -> str:
    """The name that a base weight has once LoRA is around its layer."""
    names = {name.replace(".base_layer", ""): name for name, _ in model.named_parameters()}
    return names[key]


def _train(loss: Any, batch: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The losses of `steps` steps on `batch`, each before its step; leaves the last gradients."""
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(batch)
        (value / batch.is_target.sum()).backward()
        optimizer.step()
        values.append(value.detach())
    return [float(value) for value in values]


@on_devices()
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_loss_falls_and_the_optimizer_keeps_float32(name: str, device: torch.device, tmp_path: Path) -> None:
    """Products are in bfloat16 (autocast), weights and moments in float32 on the device."""
    settings = Optimizer(name=name, learning_rate=5e-3 if name == "adamw" else 5e-2)  # type: ignore[arg-type]
    formats = number_formats(Optimizer(name="adafactor"), torch.bfloat16)
    model = loaded(llama(hidden=128), tmp_path, formats.weights, device).train()
    optimizer = make_optimizer(dict(model.named_parameters()), settings)
    losses = _train(SupervisedLoss(model, formats.autocast), only_batch(packed_rows(4), device), optimizer, 15)
    assert losses[-1] < 0.6 * losses[0]
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert parameter.dtype == torch.float32
        shapes = moment_shapes(settings, parameter.shape)
        assert {key: list(state[key].shape) for key in shapes} == shapes
        assert all((state[key].dtype, state[key].device.type) == (torch.float32, device.type) for key in shapes)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@on_devices()
def test_activation_checkpointing_saves_memory_and_changes_nothing(device: torch.device, tmp_path: Path) -> None:
    length = 8_192 if device.type == "cuda" else 256
    ids = torch.randint(3, 500, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    batch = SupervisedBatch(ids, None, torch.ones_like(ids, dtype=torch.bool))
    results: list[tuple[Tensor, dict[str, Tensor], int, int]] = []
    for is_on in (False, True):
        model = loaded(llama(layers=4, hidden=128), tmp_path, torch.float32, device).train()
        if is_on:
            enable_activation_checkpointing(model, True)
        loss = SupervisedLoss(model)
        loss(batch).backward()  # so that gradients are there already
        peak = working_bytes(lambda loss=loss: loss(batch).backward(), device)
        gradients(model)
        value, saved = _saved_bytes(lambda loss=loss: loss(batch))
        value.backward()
        results.append((value.detach().cpu(), gradients(model), saved, peak))
    (plain, reference, saved, peak), (checkpointed, ours, fewer, lower) = results
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=0)
    check_same_direction(ours, reference, 0.9999)
    assert fewer < saved / 3
    assert device.type == "cpu" or lower < peak


def _saved_bytes(call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Result of `call()`, and the bytes of all tensors that autograd saves in it."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return call(), sum(storages.values())


@on_devices()
def test_a_micro_batch_that_does_not_fit_is_not_taken(device: torch.device) -> None:
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    model = llama(hidden=128).to(device, torch.bfloat16).train()
    loss = SupervisedLoss(model)
    assert fits_into_memory(loss, 2, 64, 0.0, device)
    assert not fits_into_memory(loss, 2, 64, 2.0**50, device)
    assert all(parameter.grad is None for parameter in model.parameters())
    if device.type == "cuda":
        kept = sum(parameter.numel() for parameter in model.parameters()) * 2
        assert torch.cuda.memory_allocated(device) - before < kept + 64 * 2**20  # with what cuBLAS keeps
        free = torch.cuda.mem_get_info(device)[0]
        reserved = free - 2 * 2**30  # leaves 2 GiB for the pass
        size = find_largest_fitting(2**14, lambda rows: fits_into_memory(loss, rows, 2_048, reserved, device))
        assert 1 < size < 2**14
    assert find_largest_fitting(12, lambda rows: fits_into_memory(loss, rows, 32, 0.0 if rows <= 4 else 2.0**50, device)) == 4


def resident_memory() -> int:
    """Bytes of this process in host memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@on_devices()
def test_memory_is_measured_where_the_model_is(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = peak_memory(device)
    size = 2**30 if device.type == "cuda" else 2**26
    # A process's peak does not fall, so on the CPU what fits under an earlier peak is taken first.
    below = 0 if device.type == "cuda" else before - resident_memory()
    block = torch.ones(below + size, dtype=torch.uint8, device=device)
    assert 0.9 * size <= peak_memory(device) - before < 2 * size
    del block
    assert ("of the GPU were in use" in describe_memory_in_use(device)) == (device.type == "cuda")
