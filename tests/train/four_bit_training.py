"""Training over a base in 4 bits, in gloo processes: the recipe's own path from the model's files to a checkpoint and back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from apprentice.recipe import Recipe, load_recipe
from apprentice.train.engine.collectives import Collectives
from apprentice.train.engine.deepspeed import DeepSpeedEngine
from apprentice.train.loop import compute_validation_loss
from apprentice.train.worker import build_engine
from tests.support.checkpoints import StateReader, state_of
from tests.support.process_group import join_group
from tests.train.rows import packed_rows

STEPS, ROWS, RATE = 6, 4, 0.01  # ROWS of one step of all workers


def save_model(folder: Path) -> Path:
    """A random Llama whose matrices are large enough that tables beside their weights in 4 bits are few of the bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.05)).save_pretrained(folder)
    return folder


def bytes_of_weights(model: nn.Module) -> int:
    """Bytes of what `model` holds: its parameters, and of those in 4 bits the scales, but not their two tables of constants."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.itemsize
        if (state := getattr(parameter, "quant_state", None)) is not None:
            total += sum(part.numel() * part.itemsize for part in (state.absmax, state.state2.absmax))
    return total


def train(recipe: Recipe, collectives: Collectives) -> dict[str, Any]:
    """Trains with a validation after each step, then once more from the state after half of the steps."""

    def engine_of() -> DeepSpeedEngine:
        return build_engine(recipe, None, dtype=torch.float32, micro=1, device=torch.device("cpu"), collectives=collectives)

    def step(engine: DeepSpeedEngine, number: int) -> float:
        rows = packed_rows(ROWS, first=number % 2 * ROWS)
        mine = rows.share(collectives.reader, collectives.readers)
        outcome = engine.train_step(mine.micro_batches(1), 1.0 / rows.loss_denominator, RATE)
        return collectives.sum([outcome.nll])[0] / rows.loss_denominator

    engine, validation = engine_of(), packed_rows(2, seed=9)
    model = engine._engine.module
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    losses, validations, middle = [], [], {}
    for number in range(STEPS):
        losses.append(step(engine, number))
        validations.append(compute_validation_loss(engine, validation, 1, collectives))
        if number + 1 == STEPS // 2:
            middle = state_of(engine)
    again = engine_of()
    again.restore(StateReader(middle), STEPS // 2)
    rest = [step(again, number) for number in range(STEPS // 2, STEPS)]
    first, second = state_of(engine), state_of(again)
    return {
        "losses": losses,
        "validations": validations,
        "rest": rest,
        "differ": [name for name in first.keys() | second.keys() if not torch.equal(first[name], second[name])],
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "moved": [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before.get(name, parameter))],
        "repacks": [
            module.support_avx512bf16_for_cpu for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")
        ],
        "bytes": bytes_of_weights(model),
        "numbers": engine.trained[0],
    }


def process(rank: int, workers: int, folder: str, packages: str, files: list[str]) -> None:
    """One of `workers` processes: trains by each recipe of `files`; the first one writes results.json.

    It imports from `packages` too.
    """
    sys.path.append(packages)
    join_group(folder, rank, workers)
    collectives = Collectives()
    results = [train(load_recipe(Path(file)), collectives) for file in files]
    if rank == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()
