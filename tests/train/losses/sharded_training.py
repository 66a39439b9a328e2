"""Training under ZeRO-3 in several gloo processes whose rows hold unequal numbers of target tokens, and the same in plain PyTorch.

Every parameter is split (`stage3_param_persistence_threshold: 0`), so a process that calls a module more often than the others
waits for ever. The last process has no target token at all where the objective allows it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from apprentice.models.loading import load_model
from apprentice.models.tuning.methods import TUNING_METHODS, trainable_parameters
from apprentice.recipe import Training, Tuning
from apprentice.train.batch import PackedRows
from apprentice.train.engine.collectives import Collectives
from apprentice.train.engine.deepspeed import DeepSpeedEngine
from apprentice.train.loop import compute_validation_loss
from apprentice.train.losses import target_losses
from apprentice.train.losses.kto import measure_baseline, with_baseline
from apprentice.train.losses.loss_registry import create_loss
from apprentice.train.optimizer import make_optimizer, set_learning_rate
from tests.models.architectures import made
from tests.support.checkpoints import state_of
from tests.support.process_group import join_group
from tests.train.preference_rows import pair_rows
from tests.train.reference_training import fresh
from tests.train.rows import packed_rows, reply_rows

STEPS, ROWS, RATE = 3, 4, 1e-3  # ROWS of one step for each process
TOP = 4  # tokens of a teacher at each target
CHUNK = 5  # target tokens whose logits are computed at once


def settings(case: dict[str, Any], workers: int) -> Training:
    """The recipe's training section for `case`: every parameter split among `workers` processes."""
    every_parameter = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    grpo = {"grpo": {"reward": "run:judge"}} if case["objective"] == "grpo" else {}
    return Training.model_validate(
        {
            "workers": workers,
            "steps": STEPS,
            "global_batch": ROWS * workers,
            "micro_batch": ROWS // 2,
            "objective": "sft" if case["objective"] == "weighted" else case["objective"],
            "optimizer": {"name": "adamw", "learning_rate": RATE, "weight_decay": 0.01, "clip": 0.0}
            | {"loraplus_ratio": case.get("ratio", 1.0)},
            "deepspeed": {"stage": case.get("stage", 3), "extra": every_parameter},
            "router_loss": case.get("router_loss", 0.0),
            "activation_checkpointing": case["checkpointing"],
            **grpo,
            **({"distill": {"teacher": "run:teacher", "top": TOP}} if case["objective"] == "distill" else {}),
        }
    )


def model_of(case: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of `case`, else a tiny Llama, with its tuning method; for the objective `reward` with a new last layer."""
    if "model" in case:
        return TUNING_METHODS[case["method"]].wrap(
            made(case["model"]), Tuning(method=case["method"], rank=4, experts=case["method"] == "lora"), 3
        )
    if case["objective"] != "reward":
        return fresh(case["method"], dtype, dora=case.get("dora", False))
    return load_model(folder / "reward", torch.float32, head=3)


def rows_of(case: dict[str, Any], step: int, rank: int, workers: int) -> PackedRows:
    """Rows of one step and process. Process 0 has many target tokens, the last one of an sft case none."""
    if case["objective"] in ("dpo", "orpo", "kto", "reward"):
        return pair_rows(ROWS, seed=step * workers + rank, labelled=case["objective"] == "kto")
    if case["objective"] == "grpo":
        return reply_rows(ROWS, seed=step * workers + rank)
    rows = packed_rows(ROWS, first=(step * workers + rank) * ROWS, weighted=case["objective"] == "weighted")
    mask = rows.loss_mask.copy()
    if rank == workers - 1:
        mask[:] = 0
    elif rank > 0:
        mask[:, 12:] = 0
    masked = replace(rows, loss_mask=mask)
    return with_teacher(masked, step * workers + rank) if case["objective"] == "distill" else masked


def with_teacher(rows: PackedRows, seed: int) -> PackedRows:
    """The rows, with a made-up teacher's `TOP` likeliest tokens at each target."""
    draws, ids, values = np.random.default_rng(seed), [], []
    for count in (rows.loss_mask > 0).sum(axis=1).tolist():
        ids.append(np.concatenate([draws.permutation(400)[:TOP] for _ in range(count)] or [[]]).astype(np.int32))
        values.append(np.log(draws.dirichlet(np.ones(TOP + 1), count)).astype(np.float32).ravel())
    return replace(rows, teacher_ids=ids, teacher_log_probs=values)


def sharded(case: dict[str, Any], rank: int, workers: int, folder: Path) -> dict[str, Any]:
    """What `STEPS` steps of the engine give; `calls` counts this process's calls of the output layer, forwards alone."""
    training = settings(case, workers)
    dtype = getattr(torch, case.get("dtype", "float32"))
    model = model_of(case, folder, dtype)
    options: dict[str, Any] = {"dtype": dtype, "workers": workers, "micro": ROWS // 2, "device": torch.device("cpu")}
    calls = []
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_hook(lambda *_: calls.append(None))
    engine = DeepSpeedEngine(model, training, **options)
    result: dict[str, Any] = {"loss": [], "norm": []}
    for step in range(STEPS):
        mine = rows_of(case, step, rank, workers)
        counted = Collectives().sum([mine.loss_denominator])[0]
        batches = mine.micro_batches(ROWS // 2)
        if mine.desirable is not None:
            batches = with_baseline(batches, measure_baseline(engine, mine, ROWS // 2, Collectives()))
        outcome = engine.train_step(batches, 1.0 / counted, RATE)
        result["loss"].append(Collectives().sum([outcome.nll])[0] / counted)
        result["norm"].append(outcome.grad_norm)
    result["validation"] = compute_validation_loss(engine, rows_of(case, STEPS, 0, workers), ROWS // 2, Collectives())
    result["weights"] = {key[7:]: value for key, value in state_of(engine).items() if key.startswith("weight/")}
    return result | {"calls": Collectives().gather(len(calls))}


def plain(case: dict[str, Any], workers: int, folder: Path) -> dict[str, Any]:
    """The same steps in one process, in plain PyTorch and float32, with all logits at once."""
    training = settings(case, workers).model_copy(update={"activation_checkpointing": False})
    model = model_of(case, folder)
    loss_module = create_loss(model, training).train()
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(parameters, training.optimizer)
    set_learning_rate(optimizer, RATE)
    result: dict[str, Any] = {"loss": [], "norm": []}
    for step in range(STEPS):
        parts = [rows_of(case, step, rank, workers) for rank in range(workers)]
        counted = sum(part.loss_denominator for part in parts)
        losses = [loss_module(batch) for part in parts for batch in labelled(part.micro_batches(1), parts, loss_module)]
        loss = torch.stack(losses).sum() / counted
        optimizer.zero_grad()
        loss.backward()
        result["loss"].append(loss.item())
        result["norm"].append(torch.nn.utils.clip_grad_norm_(parameters.values(), 1e9).item())
        optimizer.step()
    rows = rows_of(case, STEPS, 0, workers)
    with torch.no_grad():
        summed = sum(float(loss_module(batch)) for batch in labelled(rows.micro_batches(1), [rows], loss_module))
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return result | {"validation": summed / rows.loss_denominator, "weights": weights}


def labelled(batches: list[Any], rows: list[PackedRows], loss: Any) -> list[Any]:
    """The `batches` with the mean divergence from the reference over all mismatched answers of `rows`, where there are labels."""
    if rows[0].desirable is None:
        return batches
    with torch.no_grad():
        total = sum(float(loss(batch)) for part in rows for batch in part.mismatched_batches(1))
    return with_baseline(batches, max(0.0, total / sum(part.loss_denominator for part in rows)))


def process(rank: int, workers: int, folder: str, cases: list[dict[str, Any]]) -> None:
    """One of `workers` processes: trains every case of `cases`; the first one saves the results as they come."""
    join_group(folder, rank, workers)
    target_losses.CHUNK_NUMBERS = CHUNK * 512
    results = []
    for case in cases:
        results.append(sharded(case, rank, workers, Path(folder)))
        if rank == 0:
            torch.save(results, Path(folder) / "results.pt")
    dist.barrier()
    dist.destroy_process_group()
