"""Training on one GPU: the share of its peak FLOP/s that our step uses (MFU), the memory it takes, and the speed against TRL.

The model is a Llama shape of about 1.2B parameters with random weights in bfloat16, trained whole and with LoRA on packed rows
of 4,096 tokens; the peer is TRL's SFTTrainer. Ours is the engine that a run's worker builds, in one process and without Ray.
Every token but an example's first is predicted. The input embedding, which is a look-up and no product, does not count.
`--tiny` runs the same with a tiny shape, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from apprentice.models.loading import count_parameters, resolve_dtype
from apprentice.pretrained.hub import local_folder
from apprentice.recipe import Recipe
from apprentice.train.batch import PackedRows, RowFacts
from apprentice.train.engine.collectives import Collectives
from apprentice.train.engine.deepspeed_config import choose_micro_batch
from apprentice.train.memory.measure import peak_memory
from apprentice.train.metrics import mfu as flops
from apprentice.train.worker import build_engine
from benchmarks.figures import claim_stdout, report
from benchmarks.training import peer_trainers

WARM_UP = 2  # first steps, which are not measured
EXAMPLES = 4  # in a row
GOAL, TRL_GOAL = 0.5, 1.0
FIGURES = ("gpu.mfu_full", "gpu.mfu_lora", "gpu.peak_memory_gib", "gpu.vs_trl")
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """Shape of a Llama model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


LARGE, TINY = Shape(2048, 5632, 22, 32, 8), Shape(64, 128, 2, 4, 2)


@dataclass(frozen=True)
class Measurement:
    """Measurements of a training process over the steps after the warm-up."""

    targets_per_s: float
    tokens_per_s: float
    peak_memory: int  # bytes
    micro: int  # rows in a micro-batch
    trained: int


def make_model(shape: Shape, tokenizer: str, folder: Path) -> int:
    """Writes a model of `shape` with random weights, and the tokenizer of the model `tokenizer`, into `folder`.

    Returns the number of parameters of its input embedding.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(local_folder(tokenizer))
    words.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=4096, tie_word_embeddings=False, **asdict(shape))
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return len(words) * shape.hidden_size


def rows_of(count: int, length: int, vocabulary: int, seed: int) -> PackedRows:
    """`count` full packed rows of `length` tokens, each of `EXAMPLES` examples of equal length with random token ids."""
    size = length // EXAMPLES
    ids = np.random.default_rng(seed).integers(3, vocabulary, (count, size * EXAMPLES)).astype(np.int32)
    places = np.broadcast_to(np.arange(size * EXAMPLES), ids.shape)
    counted = (places % size > 0).astype(np.uint8)
    facts = [RowFacts(0, row, list(range(EXAMPLES)), [0] * EXAMPLES, [size - 1] * EXAMPLES, {}) for row in range(count)]
    return PackedRows(ids, (places % size).astype(np.int32), (places // size + 1).astype(np.int32), counted, facts)


def recipe_of(arguments: argparse.Namespace, folder: Path, method: str) -> Recipe:
    """A recipe for one worker, with one GPU where there is one."""
    return Recipe.model_validate(
        {
            "name": method,
            "storage": str(folder.parent),
            "model": {"base": str(folder), "dtype": arguments.dtype},
            "data": {"tasks": ["quickstart"], "max_length": arguments.length, "packing": {"length": arguments.length}},
            "tuning": {"method": method},
            "training": {
                "workers": 1,
                "resources": {"gpus": int(torch.cuda.is_available())},
                "steps": arguments.steps + WARM_UP,
                "global_batch": arguments.rows,
                "micro_batch": arguments.micro or "auto",
                "activation_checkpointing": arguments.checkpointing,
                "optimizer": {"learning_rate": 1e-5},
            },
        }
    )


def measured(recipe: Recipe, steps: list[PackedRows]) -> Measurement:
    """Trains on `steps` in a fresh process and returns its measurements."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "job").write_bytes(pickle.dumps((recipe, steps)))
        torch.multiprocessing.spawn(_process, (folder,), nprocs=1)
        return Measurement(**json.loads((Path(folder) / "found").read_text()))


def _process(_: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    recipe, steps = pickle.loads((Path(folder) / "job").read_bytes())
    on_gpu = recipe.training.resources.gpus > 0
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    length = recipe.data.packing.length
    micro = choose_micro_batch(recipe.training, workers=1, length=length, on_gpu=on_gpu)
    dtype = resolve_dtype(recipe.model.dtype, device.type)
    tried = length if on_gpu and recipe.training.micro_batch == "auto" else None
    engine = build_engine(recipe, None, dtype=dtype, micro=micro, device=device, collectives=Collectives(), trial_length=tried)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()  # the search for the micro-batch size went up to the limit
    tokens = targets = 0
    begin = 0.0
    for number, rows in enumerate(steps):
        if number == WARM_UP:
            begin, tokens, targets = _now(device), 0, 0
        engine.train_step(rows.micro_batches(engine.micro), 1.0 / rows.loss_denominator, recipe.training.optimizer.learning_rate)
        tokens, targets = tokens + rows.tokens, targets + rows.targets
    seconds = _now(device) - begin
    measurement = Measurement(targets / seconds, tokens / seconds, peak_memory(device), engine.micro, engine.trained[0])
    (Path(folder) / "found").write_text(json.dumps(asdict(measurement)))
    dist.destroy_process_group()


def _now(device: torch.device) -> float:
    """The time in seconds, once the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def utilisation(measurement: Measurement, numbers: int, embedding: int, peak: float) -> float:
    """Share of `peak` FLOP/s; the embedding does not count, since it is trained with the whole model but never multiplied."""
    trained = measurement.trained - (embedding if measurement.trained == numbers else 0)
    return flops.flops_per_token(numbers - embedding, trained) * measurement.tokens_per_s / peak


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Measures and reports everything."""
    embedding = make_model(TINY if arguments.tiny else LARGE, arguments.tokenizer, folder)
    numbers = count_parameters(folder)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    vocabulary = embedding // (TINY if arguments.tiny else LARGE).hidden_size
    steps = [rows_of(arguments.rows, arguments.length, vocabulary, seed) for seed in range(arguments.steps + WARM_UP)]
    peak, full = flops.peak_flops(name), None
    for method in ("full", "lora"):
        measurement = measured(recipe_of(arguments, folder, method), steps)
        full = full or measurement
        facts: dict[str, Any] = {
            "device": name,
            "numbers": numbers,
            "tokens_per_s": round(measurement.tokens_per_s, 1),
            "peak_memory_gib": round(measurement.peak_memory / GIB, 2),
            "rows_at_once": measurement.micro,
            "runs": 1,
        }
        if peak is None:
            report(f"gpu.mfu_{method}", None, why=f"the peak of {name} is not known", **facts)
        else:
            report(f"gpu.mfu_{method}", utilisation(measurement, numbers, embedding, peak), unit="ratio", **facts, goal=GOAL)
    assert full is not None
    report("gpu.peak_memory_gib", full.peak_memory / GIB, unit="GiB", device=name, runs=1)
    if find_spec("trl") is None:
        report("gpu.vs_trl", None, why="trl is not installed here")
        return
    same = recipe_of(argparse.Namespace(**vars(arguments) | {"micro": full.micro}), folder, "full")
    peer = peer_trainers.measured("trl", same, steps).tokens_per_s
    sides: dict[str, Any] = {"ours": round(full.targets_per_s, 1), "peer": {"name": "trl SFTTrainer", "value": round(peer, 1)}}
    report("gpu.vs_trl", full.targets_per_s / peer, unit="ratio", **sides, device=name, runs=1, goal=TRL_GOAL)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, on a CPU too: to see that it runs")
    parser.add_argument("--tokenizer", default="smollm2-135m-instruct", help="a model whose tokenizer is taken")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--micro", type=int, default=0, help="rows at once; 0: as many as fit")
    parser.add_argument("--checkpointing", action="store_true", help="keep only the inputs of layers")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args(words)
    if not (torch.cuda.is_available() or arguments.tiny):
        why = "there is no GPU here; --tiny shows on a CPU that it would run"
        for figure in FIGURES:
            report(figure, None, why=why)
        return
    # Without this, DeepSpeed, which transformers imports too, prints the accelerator that it detects.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        run(arguments, Path(folder) / "model")


if __name__ == "__main__":
    claim_stdout()
    main(sys.argv[1:])
