"""A whole step of the engine reads nothing on the host before its end: a GPU would make the host wait there for all queued work."""

from __future__ import annotations

import itertools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apprentice.models.attention import varlen
from apprentice.recipe import Training
from apprentice.train.engine.deepspeed import DeepSpeedEngine
from tests.support.process_group import join_group
from tests.train.losses.test_host_reads import without_reads
from tests.train.reference_training import fresh
from tests.train.rows import packed_rows

CPU = torch.device("cpu")
MICRO_BATCHES = 3
STAGES, METHODS = (0, 1, 2, 3), ("full", "lora")


class HostReads(TorchDispatchMode):
    """Notes room and function of the frame that reads a tensor's value; reads inside PyTorch are their caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            frames = [frame for frame in traceback.extract_stack(sys._getframe(1)) if "/torch/" not in frame.filename]
            parts = Path(frames[-1].filename).parts
            room = next((name for name in ("apprentice", "deepspeed", "transformers", "peft") if name in parts), "other")
            self.places.append(f"{room}:{frames[-1].name}")
        return function(*args, **(kwargs or {}))


def reads_of(call: Callable[[], Any]) -> list[str]:
    with HostReads() as reads:
        call()
    return reads.places


def process(rank: int, folder: str) -> None:
    join_group(folder)
    varlen.register_varlen()
    varlen.varlen_attn = without_reads
    results = {}
    for stage, method in itertools.product(STAGES, METHODS):
        config = {"stage": stage, "extra": {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}}
        training = Training.model_validate({"workers": 1, "steps": 4, "global_batch": 6, "micro_batch": 2, "deepspeed": config})
        model = fresh(method, torch.float32)
        model.get_base_model().set_attn_implementation("varlen") if method == "lora" else model.set_attn_implementation("varlen")
        engine = DeepSpeedEngine(model, training, dtype=torch.float32, workers=1, micro=2, device=CPU)
        batches = packed_rows(2 * MICRO_BATCHES).micro_batches(2)
        assert len(batches) == MICRO_BATCHES
        engine.train_step(batches, 1.0, 1e-3)  # the first one prepares what later ones use
        results[stage, method] = reads_of(lambda engine=engine, batches=batches: engine.train_step(batches, 1.0, 1e-3))
    torch.save(results, Path(folder) / "reads.pt")


@pytest.mark.slow
def test_a_step_reads_at_its_end_alone(tmp_path: Path) -> None:
    """Of three micro-batches. Before loss and norm, which the loop records, DeepSpeed looks once whether the norm is a number."""
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=1)
    results = torch.load(tmp_path / "reads.pt")
    assert set(results) == set(itertools.product(STAGES, METHODS))
    for (stage, method), places in results.items():
        deepspeeds, own = places[:-2], places[-2:]
        assert own == ["apprentice:train_step"] * 2, (stage, method, places)
        assert set(deepspeeds) <= {"deepspeed:is_invalid_grad_norm"}, (stage, method, places)
        assert len(deepspeeds) <= 2, (stage, method, places)  # once for each group of parameters, as many as in a step of one batch
        assert bool(deepspeeds) == (stage > 0)
