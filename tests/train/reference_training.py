"""What each of some processes does in the tests of the engine: trains beside a plain PyTorch reference and compares.

The processes are plain ones with torch.distributed over gloo, without Ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from apprentice.models.tuning.methods import TUNING_METHODS, trainable_parameters
from apprentice.recipe import Training, Tuning
from apprentice.train.engine.collectives import Collectives
from apprentice.train.engine.deepspeed import DeepSpeedEngine
from apprentice.train.loop import compute_validation_loss
from apprentice.train.optimizer import make_optimizer, moment_shapes
from tests.support.checkpoints import StateReader, state_of
from tests.support.process_group import join_group
from tests.train.rows import counted, packed_rows, reference_nll

STEPS = 4
ROWS = 12  # of one step, over all workers
PROMPT, REPLY = list(range(40, 52)), [7, 300]


def fresh(method: str, dtype: torch.dtype, **tuning: Any) -> Any:
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
    return TUNING_METHODS[method].wrap(
        LlamaForCausalLM(config).to(dtype), Tuning.model_validate({"method": method, "rank": 4} | tuning), 3
    )


def settings(case: dict[str, Any]) -> Training:
    extra: dict[str, Any] = {"fp16": {"initial_scale_power": case["scale"].bit_length() - 1}} if "scale" in case else {}
    if case["stage"] == 3:  # with DeepSpeed's default a small model is never split
        extra["zero_optimization"] = {"stage3_param_persistence_threshold": 0}
    return Training.model_validate(
        {
            "workers": case["workers"],
            "steps": STEPS,
            "global_batch": ROWS,
            "micro_batch": ROWS // case["workers"] // case["accumulation"],
            "optimizer": {
                "name": case["optimizer"],
                "states": case.get("states", "float32"),
                **{"learning_rate": 1e-3, "weight_decay": 0.01, "clip": case["clip"]},
            },
            "deepspeed": {"stage": case["stage"], "extra": extra},
            "activation_checkpointing": case["accumulation"] == 3,
        }
    )


def weights_of(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    return {key.removeprefix("weight/"): value for key, value in state_of(engine).items() if key.startswith("weight/")}


def ours(case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Some steps with DeepSpeed, then the state carried into a fresh engine and one more step with both."""
    dtype = getattr(torch, case["dtype"])
    training = settings(case)
    workers, micro = case["workers"], training.micro_batch
    assert isinstance(micro, int)
    part, weighted = ROWS // workers, case.get("weighted", False)
    made: dict[str, Any] = {"dtype": dtype, "workers": workers, "micro": micro, "device": torch.device("cpu")}
    model = fresh(case["method"], torch.float32 if case["optimizer"] == "adafactor" else dtype)
    before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    engine = DeepSpeedEngine(model, training, **made)
    values: dict[str, Any] = {"loss": [], "norm": []}
    for step in range(STEPS):
        mine = packed_rows(part, first=step * ROWS + rank * part, weighted=weighted)
        together = Collectives().sum([mine.loss_denominator])[0]
        outcome = engine.train_step(mine.micro_batches(micro), 1.0 / together, 1e-3)
        values["loss"].append(Collectives().sum([outcome.nll])[0] / together)
        values["norm"].append(outcome.grad_norm)
        if step == 0:
            values["update"] = norm_of(before, weights_of(engine))
            # Adam's first moment is a tenth of the first gradient.
            values["gradients"] = {
                key.removeprefix("exp_avg/"): value * 10 for key, value in state_of(engine).items() if "exp_avg/" in key
            }
            values["likeliest"] = [engine.likeliest(PROMPT, REPLY[:said]) for said in range(3)]
    values["scaling"] = engine.loss_scaling()
    values["validation"] = compute_validation_loss(engine, packed_rows(5, first=900, weighted=weighted), micro, Collectives())
    values |= carried_on(engine, case, training, made, rank)
    return values


def carried_on(
    engine: DeepSpeedEngine, case: dict[str, Any], training: Training, made: dict[str, Any], rank: int
) -> dict[str, Any]:
    state = state_of(engine)
    model = fresh(case["method"], torch.float32 if case["optimizer"] == "adafactor" else made["dtype"])
    second = DeepSpeedEngine(model, training, **made)
    second.restore(StateReader(state), STEPS, engine.loss_scaling())
    restored = state_of(second)
    part = ROWS // made["workers"]
    mine = packed_rows(part, first=800 + rank * part).micro_batches(made["micro"])
    outcomes = [each.train_step(mine, 0.01, 1e-3) for each in (engine, second)]
    ends = [state_of(each) for each in (engine, second)]
    return {
        "end_scaling": (engine.loss_scaling(), second.loss_scaling()),
        "whole": len(state)
        == sum(1 + len(moment_shapes(training.optimizer, p.shape)) for p in trainable_parameters(model).values())
        > 0
        if case["stage"] < 3
        else len(state) > 0,
        "restored": all(torch.equal(state[key], restored[key]) for key in state),
        "same_step": outcomes[0] == outcomes[1] and all(torch.equal(ends[0][key], ends[1][key]) for key in state),
    }


def reference(method: str, clip: float, optimizer_name: str, weighted: bool) -> dict[str, Any]:
    """The same training in plain PyTorch, float32, every example by itself."""
    model = fresh(method, torch.float32)
    parameters = trainable_parameters(model)
    chosen = {"workers": 1, "accumulation": 1, "stage": 0, "clip": clip, "optimizer": optimizer_name}
    optimizer = make_optimizer(parameters, settings(chosen).optimizer)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    values: dict[str, Any] = {"loss": [], "norm": []}
    for step in range(STEPS):
        rows = packed_rows(ROWS, first=step * ROWS, weighted=weighted)
        loss = reference_nll(model, rows) / counted(rows)
        optimizer.zero_grad()
        loss.backward()
        values["loss"].append(loss.item())
        values["norm"].append(torch.nn.utils.clip_grad_norm_(parameters.values(), clip or 1e9).item())
        if step == 0:
            values["gradients"] = {name: parameter.grad.clone() for name, parameter in parameters.items()}
        optimizer.step()
        if step == 0:
            values["update"] = norm_of(before, {name: parameter.detach() for name, parameter in parameters.items()})
            texts = (torch.tensor([PROMPT + REPLY[:said]]) for said in range(3))
            values["likeliest"] = [int(model(text).logits[0, -1].argmax()) for text in texts]
    rows = packed_rows(5, first=900, weighted=weighted)
    with torch.no_grad():
        values["validation"] = reference_nll(model, rows).item() / counted(rows)
    return values


def norm_of(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    assert before.keys() == after.keys()
    return sum(float((after[name].double() - before[name].double()).square().sum()) for name in before) ** 0.5


def process(rank: int, workers: int, folder: str, cases: list[dict[str, Any]]) -> None:
    join_group(folder, rank, workers)
    # DeepSpeed looks for instructions that multiply float16 fast; slow ones do for a test.
    CPU_Accelerator.is_fp16_supported = lambda _: True
    values = [ours(case, rank) for case in cases]
    if rank == 0:
        torch.save(values, Path(folder) / "values.pt")
    dist.barrier()
    dist.destroy_process_group()
