"""Training whose workers share rows, in several gloo processes, and the same in plain PyTorch, every example by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, MistralConfig

from apprentice.models.attention.backend_choice import PackedCompute, choose_attention
from apprentice.models.compat import model_class_of, set_implementations
from apprentice.models.tuning.methods import TUNING_METHODS, load_trainable, trainable_parameters
from apprentice.recipe import Training, Tuning
from apprentice.train.engine.collectives import Collectives
from apprentice.train.engine.deepspeed import DeepSpeedEngine
from apprentice.train.engine.sequence_group import SequenceGroup
from apprentice.train.loop import compute_validation_loss
from apprentice.train.losses import target_losses
from apprentice.train.optimizer import make_optimizer
from tests.support.checkpoints import StateReader, state_of
from tests.support.process_group import join_group
from tests.train.rows import counted, packed_rows, reference_nll

STEPS, ROWS, RATE = 3, 4, 1e-3  # ROWS of one step of all workers
VALIDATION_ROWS = 3
CHUNK = 5  # target tokens whose logits are computed at once
WINDOW = 4  # tokens that a token sees where the case has a sliding window
PROMPT, REPLY = list(range(40, 47)), [7, 300]


def settings(case: dict[str, Any], workers: int, sharing: int) -> Training:
    """The recipe's training section for `case`, with micro-batches of half of a group's rows."""
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if case["stage"] == 3 else {}
    return Training.model_validate(
        {
            "workers": workers,
            "sequence_parallel": sharing,
            "steps": STEPS,
            "global_batch": ROWS,
            "micro_batch": max(1, ROWS * sharing // workers // 2),
            "optimizer": {"name": "adamw", "learning_rate": RATE, "weight_decay": 0.01, "clip": 0.0},
            "deepspeed": {"stage": case["stage"], "extra": extra},
            "activation_checkpointing": case["checkpointing"],
        }
    )


def model_of(case: dict[str, Any], sharing: int, attention: str = "auto") -> Any:
    """A random model of 4 heads, with `case`'s heads of keys and values; `sharing` workers share its rows."""
    from transformers import AutoModelForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape: dict[str, Any] = {**sizes, "num_key_value_heads": case["kv_heads"], "initializer_range": 0.1}
    config = MistralConfig(**shape, sliding_window=WINDOW) if case["window"] else LlamaConfig(**shape)
    packed = PackedCompute("cpu", torch.float32, sequence_parallel=sharing)
    set_implementations(config, choose_attention(attention, packed, config, model_class_of(AutoModelForCausalLM, config)))
    torch.manual_seed(0)
    return TUNING_METHODS[case["method"]].wrap(AutoModelForCausalLM.from_config(config), Tuning(method=case["method"], rank=4), 3)


def engine_of(
    case: dict[str, Any], sharing: int, weights: dict[str, torch.Tensor] | None = None
) -> tuple[DeepSpeedEngine, Collectives]:
    """A fresh engine among all processes, `sharing` of which share rows, with `weights` if they are given."""
    collectives = Collectives(sharing)
    training = settings(case, collectives.workers, sharing)
    options: dict[str, Any] = {"workers": collectives.workers, "micro": training.micro_batch, "device": torch.device("cpu")}
    model, group = model_of(case, sharing), SequenceGroup.join(sharing)
    if weights is not None:
        load_trainable(model, weights)
    return DeepSpeedEngine(model, training, dtype=torch.float32, **options, sequence_group=group), collectives


def step(engine: DeepSpeedEngine, collectives: Collectives, case: dict[str, Any], number: int) -> float:
    """Makes step `number` and returns its loss."""
    rows = packed_rows(ROWS, first=number * ROWS, weighted=case["weighted"])
    mine = rows.share(collectives.reader, collectives.readers)
    outcome = engine.train_step(mine.micro_batches(engine.micro), 1.0 / rows.loss_denominator, RATE)
    return collectives.sum([outcome.nll])[0] / rows.loss_denominator


def weights_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("weight/"): value for key, value in state.items() if key.startswith("weight/")}


def shared(case: dict[str, Any]) -> dict[str, Any]:
    """What `STEPS` steps give; the last one is also made by workers with rows of their own, from the state before it."""
    engine, collectives = engine_of(case, case["sharing"])
    losses = [step(engine, collectives, case, number) for number in range(STEPS - 1)]
    before = state_of(engine)
    losses.append(step(engine, collectives, case, STEPS - 1))
    rows = packed_rows(VALIDATION_ROWS, first=900, weighted=case["weighted"])
    result = {
        "loss": losses,
        "validation": compute_validation_loss(engine, rows, engine.micro, collectives),
        "weights": weights_of(state_of(engine)),
        "likeliest": engine.likeliest(PROMPT, REPLY),
    }
    if case["resumes"]:
        alone, collectives = engine_of(case, 1, weights_of(before))
        alone.restore(StateReader(before), STEPS - 1)
        restored = state_of(alone)
        result["restored"] = all(torch.equal(before[key], restored[key]) for key in before)
        result["resumed_loss"] = step(alone, collectives, case, STEPS - 1)
        result["resumed_weights"] = weights_of(state_of(alone))
    return result


def plain(case: dict[str, Any]) -> dict[str, Any]:
    """The same steps in plain PyTorch, every example by itself."""
    model = model_of(case, 1, "sdpa")  # needs no bounds of examples
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(parameters, settings(case, 1, 1).optimizer)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    losses = []
    for number in range(STEPS):
        rows = packed_rows(ROWS, first=number * ROWS, weighted=case["weighted"])
        loss = reference_nll(model, rows) / counted(rows)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    rows = packed_rows(VALIDATION_ROWS, first=900, weighted=case["weighted"])
    with torch.no_grad():
        validation = float(reference_nll(model, rows)) / counted(rows)
        likeliest = int(model(torch.tensor([PROMPT + REPLY])).logits[0, -1].argmax())
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return {"loss": losses, "validation": validation, "weights": weights, "likeliest": likeliest}


def process(rank: int, workers: int, folder: str, cases: list[dict[str, Any]]) -> None:
    """One of `workers` processes: trains every case of `cases`; the first one saves the results as they come."""
    join_group(folder, rank, workers)
    target_losses.CHUNK_NUMBERS = CHUNK * 512
    results = []
    for case in cases:
        results.append(shared(case))
        if rank == 0:
            torch.save(results, Path(folder) / "results.pt")
    dist.barrier()
    dist.destroy_process_group()
