"""A checkpoint of four workers at stage 2 goes on with two at stage 3, then three at stage 2, as if nothing had been."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from apprentice.storage import Folder
from apprentice.train.checkpoint.format import find_newest
from apprentice.train.checkpoint.shard_reader import open_tensors
from apprentice.train.checkpoint.shard_writer import write_checkpoint
from apprentice.train.engine.collectives import Collectives
from apprentice.train.engine.deepspeed import DeepSpeedEngine
from apprentice.train.state import State
from tests.support.checkpoints import state_of
from tests.support.process_group import join_group
from tests.train import reference_training
from tests.train.rows import packed_rows

GROUPS = ((4, 2, "float32"), (2, 3, "float32"), (3, 2, "float32"), (3, 3, "bfloat16"), (2, 1, "bfloat16"))  # workers, stage, dtype


def train(rank: int, number: int, folder: str) -> None:
    """One of a group's workers: goes on from the checkpoint, makes a step, saves, and tells what the next step would be."""
    workers, stage, dtype_name = GROUPS[number]
    dtype = getattr(torch, dtype_name)
    place = Path(folder) / f"group-{number}"
    place.mkdir(exist_ok=True)
    join_group(place, rank, workers)
    case = {"workers": workers, "accumulation": 1, "stage": stage, "clip": 1.0, "optimizer": "adamw"}
    engine = DeepSpeedEngine(
        reference_training.fresh("full", dtype),
        reference_training.settings(case),
        dtype=dtype,
        workers=workers,
        micro=reference_training.ROWS // workers,
        device=torch.device("cpu"),
    )
    checkpoints = Folder.at(folder) / "checkpoints"
    report: dict[str, Any] = {}
    if number:
        checkpoint = find_newest(checkpoints)
        assert checkpoint is not None
        with open_tensors(checkpoint) as reader:
            engine.restore(reader, checkpoint.state.step)
        report["restored"] = state_of(engine)
        report["validation"] = engine.validation_nll(packed_rows(2, first=900).micro_batches(2)[0])

    def step(step: int) -> tuple[float, float]:
        part = reference_training.ROWS // workers
        mine = packed_rows(part, first=step * reference_training.ROWS + rank * part)
        outcome = engine.train_step(mine.micro_batches(part), 1e-3, 1e-3)
        return Collectives().sum([outcome.nll])[0], outcome.grad_norm

    report["step"] = step(number)
    report["saved"] = state_of(engine)
    report["before"] = engine.validation_nll(packed_rows(2, first=900).micro_batches(2)[0])
    write_checkpoint(checkpoints, engine.shards(), State(step=number + 1), {}, collectives=Collectives())
    report["next"] = step(number + 1)
    if rank == 0:
        torch.save(report, Path(folder) / f"report-{number}.pt")
    dist.barrier()
    dist.destroy_process_group()


def train_groups(_: int, folder: str) -> None:
    """The groups one after the other, forked from a process that has imported everything."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for number, (workers, *_rest) in enumerate(GROUPS):
        torch.multiprocessing.start_processes(train, (number, folder), nprocs=workers, start_method="fork")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("groups")
    torch.multiprocessing.spawn(train_groups, (str(folder),), nprocs=1, daemon=False)
    return [torch.load(folder / f"report-{number}.pt") for number in range(len(GROUPS))]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(GROUPS)), ids=["-".join(map(str, group)) for group in GROUPS[1:]])
def test_the_state_is_the_same_to_the_bit_and_the_next_step_too(number: int, reports: list[dict[str, Any]]) -> None:
    before, after = reports[number - 1], reports[number]
    assert before["saved"].keys() == after["restored"].keys()
    assert all(torch.equal(after["restored"][key], value) for key, value in before["saved"].items())
    is_exact = GROUPS[number][2] == GROUPS[number - 1][2] == "float32"
    assert after["validation"] == pytest.approx(before["before"], rel=1e-6 if is_exact else 2e-2)
    assert after["step"] == pytest.approx(before["next"], rel=1e-5 if is_exact else 5e-2)
