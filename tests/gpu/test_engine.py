"""DeepSpeed's engine on one GPU against plain PyTorch on the CPU: ZeRO-2 and ZeRO-3 with every weight split, checkpoints, formats.

On the CPU the same tests are run by hand (`-m long`): CI has its own with one, two and four processes (tests/train/engine).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from apprentice.models.attention.backend_choice import PackedCompute
from apprentice.models.loading import load_model
from apprentice.models.tuning.methods import TUNING_METHODS, trainable_parameters
from apprentice.recipe import Training, Tuning
from apprentice.storage import Folder
from apprentice.train.checkpoint.format import find_newest
from apprentice.train.checkpoint.shard_reader import open_tensors
from apprentice.train.engine.collectives import Collectives
from apprentice.train.engine.deepspeed import DeepSpeedEngine
from apprentice.train.engine.model_splitter import create_splitter
from apprentice.train.optimizer import make_optimizer
from apprentice.train.state import State
from tests.gpu.on_devices import BOTH_DTYPES, llama, on_devices
from tests.support.checkpoints import save, state_of
from tests.train.rows import packed_rows, reference_nll

ROWS, MICRO, RATE = 4, 2, 1e-3
ENGINES = on_devices(pytest.mark.long)
STAGES = pytest.mark.parametrize("stage", [2, 3])

# DeepSpeed warns of its own use of PyTorch.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: benchmarks/gpu_bundle.sh makes its wheel"),
]
Join = Callable[[torch.device], None]


@pytest.fixture(scope="module")
def join(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Join]:
    """Makes this process the only one of a group, over NCCL on a GPU and gloo on the CPU."""

    def start(device: torch.device) -> None:
        if not dist.is_initialized():
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
            store = f"file://{tmp_path_factory.mktemp('group')}/store"
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=store, rank=0, world_size=1)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def training(stage: int, *, optimizer: str = "adamw", checkpointing: bool = False) -> Training:
    # With DeepSpeed's default a small model is never split.
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    return Training.model_validate(
        {
            "steps": 8,
            "global_batch": ROWS,
            "micro_batch": MICRO,
            "optimizer": {"name": optimizer, "learning_rate": RATE, "weight_decay": 0.01},
            "deepspeed": {"stage": stage, "extra": extra},
            "activation_checkpointing": checkpointing,
        }
    )


def engine_of(model: Any, settings: Training, dtype: torch.dtype, device: torch.device) -> DeepSpeedEngine:
    return DeepSpeedEngine(model, settings, dtype=dtype, workers=1, micro=MICRO, device=device)


def tuned(method: str, dtype: torch.dtype) -> Any:
    return TUNING_METHODS[method].wrap(llama(hidden=64).to(dtype), Tuning(method=method, rank=4), 0).train()  # type: ignore[arg-type]


def step(engine: DeepSpeedEngine, first: int = 0, rate: float = RATE) -> tuple[float, float]:
    """The mean loss and the gradient's norm of a step on the rows from `first` on."""
    rows = packed_rows(ROWS, first=first)
    outcome = engine.train_step(rows.micro_batches(MICRO), 1.0 / rows.targets, rate)
    return outcome.nll / rows.targets, outcome.grad_norm


def plain_steps(method: str, settings: Training, steps: int) -> list[tuple[float, float]]:
    """Loss and norm of each step in plain PyTorch, float32 on the CPU, every example in a pass of its own."""
    model = tuned(method, torch.float32)
    parameters = trainable_parameters(model)
    optimizer, results = make_optimizer(parameters, settings.optimizer), []
    for number in range(steps):
        rows = packed_rows(ROWS, first=number * ROWS)
        loss = reference_nll(model, rows) / rows.targets
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings.optimizer.clip)
        optimizer.step()
        results.append((loss.item(), float(norm)))
    return results


@ENGINES
@STAGES
@BOTH_DTYPES
@pytest.mark.parametrize(("method", "checkpointing"), [("full", False), ("full", True), ("lora", False), ("lora", True)])
def test_steps_are_those_of_plain_pytorch(
    method: str, checkpointing: bool, dtype: torch.dtype, stage: int, device: torch.device, join: Join
) -> None:
    join(device)
    settings = training(stage, checkpointing=checkpointing)
    engine = engine_of(tuned(method, dtype), settings, dtype, device)
    values = [step(engine, number * ROWS) for number in range(3)]
    for (loss, norm), (expected, of_reference) in zip(values, plain_steps(method, settings, 3), strict=True):
        is_exact = dtype == torch.float32
        assert loss == pytest.approx(expected, rel=1e-4 if is_exact else 1e-2)
        assert norm == pytest.approx(of_reference, rel=1e-3 if is_exact else 5e-2)


@ENGINES
@STAGES
def test_the_loss_falls_in_bfloat16(stage: int, device: torch.device, join: Join) -> None:
    join(device)
    engine = engine_of(tuned("full", torch.bfloat16), training(stage), torch.bfloat16, device)
    losses = [step(engine, rate=1e-2)[0] for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]


@ENGINES
@STAGES
def test_bfloat16_weights_have_float32_copies_and_moments(stage: int, device: torch.device, join: Join) -> None:
    join(device)
    model = tuned("full", torch.bfloat16)
    engine = engine_of(model, training(stage), torch.bfloat16, device)
    step(engine)
    shards = engine.shards()
    assert {shard.key.split("/")[0] for shard in shards} == {"weight", "exp_avg", "exp_avg_sq"}
    assert {(shard.read().dtype, shard.read().device.type) for shard in shards} == {(torch.float32, device.type)}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    if stage == 3:
        assert all(parameter.numel() == 0 for parameter in model.parameters())  # split up, each in its turn gathered


@ENGINES
def test_adafactor_updates_float32_weights(device: torch.device, join: Join) -> None:
    join(device)
    model = tuned("full", torch.float32)
    engine = engine_of(model, training(0, optimizer="adafactor"), torch.bfloat16, device)
    losses = [step(engine, rate=3e-2)[0] for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {shard.key.split("/")[0] for shard in engine.shards()} == {"weight", "row_var", "col_var", "variance"}


@ENGINES
@STAGES
@BOTH_DTYPES
def test_a_checkpoint_goes_out_and_in(dtype: torch.dtype, stage: int, device: torch.device, join: Join, tmp_path: Path) -> None:
    join(device)
    engine = engine_of(tuned("full", dtype), training(stage), dtype, device)
    for number in range(2):
        step(engine, number * ROWS)
    state = state_of(engine)
    save(Folder.at(tmp_path), state.items(), State(step=2), {})
    checkpoint = find_newest(Folder.at(tmp_path))
    assert checkpoint is not None
    fresh = tuned("full", dtype)
    other = engine_of(fresh, training(5 - stage), dtype, device)  # written at stage 2, read at stage 3
    with open_tensors(checkpoint) as reader:
        other.restore(reader, checkpoint.state.step)
    restored = state_of(other)
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[key], value) for key, value in state.items())
    ours, theirs = step(engine, 2 * ROWS), step(other, 2 * ROWS)
    assert ours == pytest.approx(theirs, rel=1e-5 if dtype == torch.float32 else 1e-2)


@ENGINES
def test_a_step_of_zero_3_without_targets_in_one_micro_batch(device: torch.device, join: Join) -> None:
    join(device)
    engine = engine_of(tuned("full", torch.bfloat16), training(3, checkpointing=True), torch.bfloat16, device)
    first, second = packed_rows(ROWS).micro_batches(MICRO)
    second = second._replace(is_target=torch.zeros_like(second.is_target), places=None)  # type: ignore[union-attr]
    outcome = engine.train_step([first, second], 0.01, RATE)
    assert outcome.nll > 0
    assert 0 < outcome.grad_norm < float("inf")
    assert engine.validation_nll(second) == 0.0


@ENGINES
@BOTH_DTYPES
def test_a_model_that_is_split_as_it_is_loaded(dtype: torch.dtype, device: torch.device, join: Join, tmp_path: Path) -> None:
    """Its parts lie on the device from the beginning, each byte of the file is read once, and its steps are a whole model's."""
    needed = "needs the transformers of constraints.txt"
    pytest.importorskip("apprentice.models.weights.split_model", reason=needed, exc_type=ImportError)
    join(device)
    llama(hidden=64).to(dtype).save_pretrained(tmp_path)
    settings = training(3)
    chosen: dict[str, Any] = {"four_bit": False, "weights": dtype, "micro": MICRO, "device": device}
    splitter = create_splitter(settings, tmp_path, **chosen, collectives=Collectives())
    assert splitter is not None
    model: Any = load_model(tmp_path, dtype, packed=PackedCompute.on(device, dtype), splitter=splitter)
    parts = [parameter.ds_tensor for parameter in model.parameters()]
    assert {(part.device.type, part.dtype) for part in parts} == {(device.type, dtype)}
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    assert splitter.bytes_read == sum(parameter.ds_numel for parameter in model.parameters()) * dtype.itemsize
    whole = llama(hidden=64).to(dtype)
    for part, parameter in zip(parts, whole.parameters(), strict=True):
        assert torch.equal(part.cpu()[: parameter.numel()], parameter.detach().flatten())
    engine = engine_of(model.train(), settings, dtype, device)
    values = [step(engine, number * ROWS) for number in range(2)]
    for (loss, norm), (expected, of_reference) in zip(values, plain_steps("full", settings, 2), strict=True):
        assert loss == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 1e-2)
        assert norm == pytest.approx(of_reference, rel=1e-3 if dtype == torch.float32 else 5e-2)
