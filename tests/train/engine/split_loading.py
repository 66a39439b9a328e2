"""What each of several gloo processes does in the tests of split loading: it builds engines over split and whole models.

Every parameter is split (`stage3_param_persistence_threshold: 0`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from apprentice.models.attention.backend_choice import PackedCompute
from apprentice.recipe import Recipe
from apprentice.storage import Folder
from apprentice.train import worker
from apprentice.train.batch import PackedRows
from apprentice.train.checkpoint.async_saver import AsyncSaver
from apprentice.train.checkpoint.format import find_newest
from apprentice.train.checkpoint.restore import restore_model
from apprentice.train.engine import compat
from apprentice.train.engine.collectives import Collectives
from apprentice.train.engine.deepspeed import DeepSpeedEngine
from apprentice.train.engine.model_splitter import create_splitter
from apprentice.train.state import State
from tests.support.checkpoints import state_of
from tests.support.process_group import join_group
from tests.train.encoder_decoder_rows import paired_rows
from tests.train.preference_rows import pair_rows
from tests.train.rows import packed_rows

ROWS, CPU = 4, torch.device("cpu")


def recipe_of(case: dict[str, Any], workers: int) -> Recipe:
    """A recipe for the model `case["base"]` at stage 3, in which weight decay tells matrices from vectors."""
    head = {"objective": "reward"} if case.get("head") else {}
    return Recipe.model_validate(
        {
            "name": "split",
            "storage": "runs",
            "model": {"base": case["base"], "dtype": case["dtype"]},
            "tuning": {"method": case["method"], "rank": 4, "virtual_tokens": 3}
            if case["method"] != "full"
            else {"method": "full"},
            "data": {"tasks": ["quickstart"], "max_length": 24, "packing": {"length": 48}},
            "training": {
                "workers": workers,
                "steps": 2,
                "global_batch": ROWS * workers,
                "micro_batch": ROWS,
                "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1},
                "deepspeed": {"stage": 3, "extra": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}},
                **head,
            },
        }
    )


def rows_of(case: dict[str, Any], rank: int) -> PackedRows:
    if case.get("head"):
        return pair_rows(ROWS, seed=rank)
    if case.get("pairs"):
        return paired_rows(ROWS)
    rows = packed_rows(ROWS, first=rank * ROWS)
    if case["method"] in ("prefix", "prompt"):  # one example a row
        first = rows.segment_ids == 1
        rows.loss_mask[~first] = 0
        rows.segment_ids[~first] = 0
        rows.positions[:] = range(rows.positions.shape[1])
    return rows


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter of a split model, put together on each process."""
    values = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            values[name] = parameter.detach().clone()
    return values


@contextmanager
def whole_loading(is_whole: bool) -> Iterator[None]:
    """Inside it, every process loads the whole model, as it does below stage 3."""
    if is_whole:
        with patch.object(worker, "create_splitter", lambda *_, **__: None):
            yield
    else:
        yield


def shares(model: nn.Module, workers: int) -> bool:
    """Whether each parameter of the base model holds an equal share and nothing else."""
    split = [parameter for parameter in model.parameters() if compat.is_split(parameter)]
    sizes = [(parameter.numel(), parameter.ds_tensor.numel(), compat.whole_shape(parameter).numel()) for parameter in split]  # type: ignore[attr-defined]
    return bool(sizes) and all((here, part) == (0, -(-whole // workers)) for here, part, whole in sizes)


def loaded(case: dict[str, Any], recipe: Recipe, dtype: torch.dtype, collectives: Collectives) -> dict[str, Any]:
    """Loads split and whole, and compares all parameters and buffers."""
    splitter = create_splitter(
        recipe.training, Path(case["base"]), four_bit=False, weights=dtype, micro=ROWS, device=CPU, collectives=collectives
    )
    assert splitter is not None
    packed = PackedCompute.on(CPU, dtype)
    whole = restore_model(recipe, None, dtype, packed=packed)
    model = restore_model(recipe, None, dtype, packed=packed, splitter=splitter)
    values, expected = values_of(model), dict(whole.named_parameters())
    buffers = dict(whole.named_buffers())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        "shares": shares(model, collectives.workers),
        "bytes": sum(collectives.gather(splitter.bytes_read)),
        "different": [name for name, value in values.items() if name not in expected or not torch.equal(value, expected[name])],
        "same_names": values.keys() == expected.keys(),
        "same_trained": trained == {name for name, parameter in expected.items() if parameter.requires_grad},
        "buffers": all(torch.equal(value, buffers[name]) for name, value in model.named_buffers()),
    }


def engine_of(
    case: dict[str, Any], recipe: Recipe, dtype: torch.dtype, collectives: Collectives, *, is_whole: bool, restored: Any = None
) -> DeepSpeedEngine:
    with whole_loading(is_whole):
        return worker.build_engine(recipe, restored, dtype=dtype, micro=ROWS, device=CPU, collectives=collectives)


def trained(case: dict[str, Any], recipe: Recipe, dtype: torch.dtype, collectives: Collectives, folder: Path) -> dict[str, Any]:
    """Two steps over a split and over a whole model; then another over a split one that resumes after the first."""
    rows = rows_of(case, collectives.rank).micro_batches(ROWS)
    engines = [engine_of(case, recipe, dtype, collectives, is_whole=is_whole) for is_whole in (False, True)]
    first = [engine.train_step(rows, 0.1, 1e-3) for engine in engines]
    saver = AsyncSaver(
        Folder.at(folder),
        1,
        {},
        collectives=collectives,
        report=lambda *_, **__: None,
        register=lambda *_: None,
        token=None,
    )
    saver.save(State(step=1), engines[0].shards(), last=True)
    saver.close()
    second = [engine.train_step(rows, 0.1, 1e-3) for engine in engines]
    states = [state_of(engine) for engine in engines]
    checkpoint = find_newest(Folder.at(folder))
    assert checkpoint is not None
    resumed = engine_of(case, recipe, dtype, collectives, is_whole=False, restored=checkpoint)
    again = resumed.train_step(rows, 0.1, 1e-3)
    state = state_of(resumed)
    return {
        "first": first[0] == first[1],
        "second": second[0] == second[1],
        "loss": second[0].nll,
        "share_of_numbers": engines[0].trained == engines[1].trained,
        "state": states[0].keys() == states[1].keys()
        and all(torch.equal(value, states[1][key]) for key, value in states[0].items()),
        "resumed": again == second[0] and all(torch.equal(value, states[0][key]) for key, value in state.items()),
    }


def process(rank: int, workers: int, folder: str, cases: list[dict[str, Any]]) -> None:
    """One of `workers` processes; the first one saves the results."""
    join_group(folder, rank, workers)
    results = []
    for number, case in enumerate(cases):
        collectives = Collectives()
        recipe, dtype = recipe_of(case, workers), getattr(torch, case["dtype"])
        result = loaded(case, recipe, dtype, collectives)
        if case["trains"]:
            result |= trained(case, recipe, dtype, collectives, Path(folder) / f"checkpoints-{number}")
        results.append(result)
        if rank == 0:
            torch.save(results, Path(folder) / "results.pt")
    dist.barrier()
    dist.destroy_process_group()
