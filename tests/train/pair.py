"""What each of two processes does in the tests of the engine: trains beside a plain PyTorch reference and compares.

The processes are plain ones with torch.distributed over gloo, without Ray.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from apprentice.models.tuning import TUNING_METHODS, load_trainable, trainable
from apprentice.recipe import Training, Tuning
from apprentice.train.engine import DeepSpeedEngine
from apprentice.train.loop import validation_loss
from apprentice.train.optim import adamw
from apprentice.train.peers import Peers
from tests.train.rows import packed_rows, reference_nll

STEPS = 5
ROWS = 8  # of one step: 2 workers, micro-batches of 2, accumulated twice


def fresh(method: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    return TUNING_METHODS[method].wrap(LlamaForCausalLM(config).to(dtype), Tuning(method=method, rank=4), 3)  # type: ignore[arg-type]


def settings(stage: int, clip: float) -> Training:
    return Training.model_validate(
        {
            "workers": 2,
            "steps": STEPS,
            "global_batch": ROWS,
            "micro_batch": 2,
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.01, "clip": clip},
            "deepspeed": {"stage": stage},
        }
    )


def weights_of(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    return {key.removeprefix("weight/"): value.clone() for key, value in engine.state() if key.startswith("weight/")}


def ours(case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Five steps with DeepSpeed, then the state carried into a fresh engine and one more step with both."""
    dtype = getattr(torch, case["dtype"])
    training = settings(case["stage"], case["clip"])
    made: dict[str, Any] = {"dtype": dtype, "workers": 2, "micro": 2, "device": torch.device("cpu")}
    model = fresh(case["method"], dtype)
    before = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    engine = DeepSpeedEngine(model, training, **made)
    found: dict[str, Any] = {"loss": [], "norm": []}
    for step in range(STEPS):
        whole = packed_rows(ROWS, first=step * ROWS)
        mine = packed_rows(ROWS // 2, first=step * ROWS + rank * ROWS // 2)
        outcome = engine.train_step(mine.micros(2), 1.0 / whole.targets, 1e-3)
        found["loss"].append(Peers().sum([outcome.nll])[0] / whole.targets)
        found["norm"].append(outcome.grad_norm)
        if step == 0:
            found["update"] = norm_of(before, weights_of(engine))
    found["validation"] = validation_loss(engine, packed_rows(5, first=900), 2, Peers())
    found |= carried_on(engine, case, training, made, rank)
    return found


def carried_on(
    engine: DeepSpeedEngine, case: dict[str, Any], training: Training, made: dict[str, Any], rank: int
) -> dict[str, Any]:
    state = {key: value.clone() for key, value in engine.state()}
    model = fresh(case["method"], made["dtype"])
    load_trainable(model, {key.removeprefix("weight/"): value for key, value in state.items() if key.startswith("weight/")})
    second = DeepSpeedEngine(model, training, **made)
    second.restore(state.__getitem__, STEPS)
    restored = {key: value.clone() for key, value in second.state()}
    mine = packed_rows(ROWS // 2, first=800 + rank * ROWS // 2).micros(2)
    outcomes = [each.train_step(mine, 0.01, 1e-3) for each in (engine, second)]
    ends = [dict(each.state()) for each in (engine, second)]
    return {
        "tensors": len(state),
        "restored": all(torch.equal(state[key], restored[key]) for key in state),
        "same_step": outcomes[0] == outcomes[1] and all(torch.equal(ends[0][key], ends[1][key]) for key in state),
    }


def reference(method: str, clip: float) -> dict[str, Any]:
    """The same training in plain PyTorch, float32, every example by itself."""
    model = fresh(method, torch.float32)
    parameters = trainable(model)
    optimizer = adamw(parameters, settings(2, clip).optimizer)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    found: dict[str, Any] = {"loss": [], "norm": []}
    for step in range(STEPS):
        rows = packed_rows(ROWS, first=step * ROWS)
        loss = reference_nll(model, rows) / rows.targets
        optimizer.zero_grad()
        loss.backward()
        found["loss"].append(loss.item())
        found["norm"].append(torch.nn.utils.clip_grad_norm_(parameters.values(), clip or 1e9).item())
        optimizer.step()
        if step == 0:
            found["update"] = norm_of(before, {name: parameter.detach() for name, parameter in parameters.items()})
    rows = packed_rows(5, first=900)
    with torch.no_grad():
        found["validation"] = reference_nll(model, rows).item() / rows.targets
    return found


def norm_of(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    assert before.keys() == after.keys()
    return sum(float((after[name].double() - before[name].double()).square().sum()) for name in before) ** 0.5


def process(rank: int, folder: str, cases: list[dict[str, Any]]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = [ours(case, rank) for case in cases]
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
