"""Training on one GPU: the share of its peak FLOP/s that our step uses (MFU), the memory it takes, and the speed against TRL.

The model is a Llama shape of about 1.2B parameters with random weights in bfloat16, trained whole and with LoRA, at ZeRO stages 2
and 3, on packed rows of 4,096 tokens with examples of very different lengths; the peer is TRL's SFTTrainer. Ours is the engine that
a run's worker builds, in one process and without Ray. Every token but an example's first is predicted.

MFU counts the linear layers alone; the input embedding, which is a look-up and no product, does not count. `mfu_with_attention`
adds the pairs of tokens that the model uses. What attention really multiplies depends on its implementation, which is named:
`attention_tflop` has both ends for a step, with masks over whole rows and within the examples. `--tiny` runs the same with a tiny
shape, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
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
from benchmarks.training.flop_counts import LlamaShape, attention_flops, causal_pairs, example_lengths
from benchmarks.training.peer_trainers import device_of, time_on

WARM_UP = 2  # first steps, which are not measured
MEAN_EXAMPLE = 1 / 8  # of a row
CASES = {"full": ("full", 2), "full_zero3": ("full", 3), "lora": ("lora", 2), "lora_zero3": ("lora", 3)}  # method, ZeRO stage
GOALS = {"full": 0.45, "lora": 0.40}
TRL_GOAL, MEMORY_GOAL = 1.2, 1.0
FIGURES = (*(f"gpu.mfu_{case}" for case in CASES), "gpu.peak_memory_gib", "gpu.vs_trl", "gpu.memory_vs_trl")
GIB, TERA = 2**30, 1e12
LARGE, TINY = LlamaShape(2048, 5632, 22, 32, 8, 0), LlamaShape(64, 128, 2, 4, 2, 0)  # the tokenizer says how many words


@dataclass(frozen=True)
class Measurement:
    """Measurements of a training process over the steps after the warm-up."""

    targets_per_s: float
    tokens_per_s: float
    peak_memory: int  # bytes
    micro: int  # rows in a micro-batch
    trained: int
    attention: str  # transformers' name of its implementation


def make_model(shape: LlamaShape, tokenizer: str, folder: Path) -> LlamaShape:
    """Writes a model of `shape` with random weights, and the tokenizer of the model `tokenizer`, into `folder`.

    Returns the shape with the tokenizer's number of words.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(local_folder(tokenizer))
    words.save_pretrained(folder)
    torch.manual_seed(0)
    shape = shape._replace(vocab_size=len(words))
    LlamaForCausalLM(shape.config()).to(torch.bfloat16).save_pretrained(folder)
    return shape


def rows_of(lengths: list[list[int]], vocabulary: int, seed: int) -> PackedRows:
    """Full packed rows with examples of these `lengths`, all rows equally long, and random token ids."""
    ids = np.random.default_rng(seed).integers(3, vocabulary, (len(lengths), sum(lengths[0]))).astype(np.int32)
    positions = np.stack([np.concatenate([np.arange(size) for size in row]) for row in lengths]).astype(np.int32)
    segments = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]).astype(np.int32)
    facts = [
        RowFacts(0, number, list(range(len(row))), [0] * len(row), [size - 1 for size in row], {})
        for number, row in enumerate(lengths)
    ]
    return PackedRows(ids, positions, segments, (positions > 0).astype(np.uint8), facts)


def recipe_of(arguments: argparse.Namespace, folder: Path, method: str, stage: int) -> Recipe:
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
                "deepspeed": {"stage": stage},
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
    device = device_of(recipe)
    on_gpu = device.type == "cuda"
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
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
            begin, tokens, targets = time_on(device), 0, 0
        engine.train_step(rows.micro_batches(engine.micro), 1.0 / rows.loss_denominator, recipe.training.optimizer.learning_rate)
        tokens, targets = tokens + rows.tokens, targets + rows.targets
    seconds = time_on(device) - begin
    measurement = Measurement(
        targets / seconds, tokens / seconds, peak_memory(device), engine.micro, engine.trained[0], engine.attention
    )
    (Path(folder) / "found").write_text(json.dumps(asdict(measurement)))
    dist.destroy_process_group()


def utilisation(measurement: Measurement, numbers: int, embedding: int, peak: float) -> float:
    """Share of `peak` FLOP/s; the embedding does not count, since it is trained with the whole model but never multiplied."""
    trained = measurement.trained - (embedding if measurement.trained == numbers else 0)
    return flops.flops_per_token(numbers - embedding, trained) * measurement.tokens_per_s / peak


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Measures and reports everything."""
    shape = make_model(TINY if arguments.tiny else LARGE, arguments.tokenizer, folder)
    lengths = [
        example_lengths(arguments.rows, arguments.length, int(MEAN_EXAMPLE * arguments.length), seed)
        for seed in range(arguments.steps + WARM_UP)
    ]
    steps = [rows_of(rows, shape.vocab_size, seed) for seed, rows in enumerate(lengths)]
    measurements = {}
    for case, (method, stage) in CASES.items():
        measurements[case] = measured(recipe_of(arguments, folder, method, stage), steps)
        report_mfu(case, measurements[case], shape, count_parameters(folder), lengths)
    full = measurements["full"]
    report("gpu.peak_memory_gib", full.peak_memory / GIB, unit="GiB", device=device_name(), runs=1)
    report_trl(arguments, folder, steps, full)


def device_name() -> str:
    """Name of the GPU, or `CPU`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def report_mfu(case: str, measurement: Measurement, shape: LlamaShape, numbers: int, lengths: list[list[list[int]]]) -> None:
    """Reports the MFU of a case; `lengths` are the examples of each step's rows."""
    peak, tokens = flops.peak_flops(device_name()), sum(size for rows in lengths for row in rows for size in row)
    causal = attention_flops(shape, sum(map(causal_pairs, lengths)))
    dense = attention_flops(shape, sum(sum(row) ** 2 for rows in lengths for row in rows))
    facts: dict[str, Any] = {
        "device": device_name(),
        "numbers": numbers,
        "tokens_per_s": round(measurement.tokens_per_s, 1),
        "peak_memory_gib": round(measurement.peak_memory / GIB, 2),
        "rows_at_once": measurement.micro,
        "examples_a_row": round(sum(len(row) for rows in lengths for row in rows) / sum(map(len, lengths)), 1),
        "attention": measurement.attention,
        "attention_tflop": {name: round(value / len(lengths) / TERA, 4) for name, value in (("rows", dense), ("examples", causal))},
        "runs": 1,
    }
    figure = f"gpu.mfu_{case}"
    if peak is None:
        report(figure, None, why=f"the peak of {device_name()} is not known", **facts)
        return
    mfu = utilisation(measurement, numbers, shape.vocab_size * shape.hidden_size, peak)
    facts["mfu_with_attention"] = round(mfu + causal / tokens * measurement.tokens_per_s / peak, 4)
    report(figure, mfu, unit="ratio", **facts, goal=GOALS[case.removesuffix("_zero3")])


def report_trl(arguments: argparse.Namespace, folder: Path, steps: list[PackedRows], full: Measurement) -> None:
    """Reports our speed and memory against TRL's, with as many rows at once as ours or, where they do not fit, half as many."""
    if find_spec("trl") is None:
        for figure in FIGURES[-2:]:
            report(figure, None, why="trl is not installed here")
        return
    micro = full.micro
    while True:
        recipe = recipe_of(argparse.Namespace(**vars(arguments) | {"micro": micro}), folder, "full", 2)
        try:
            peer = peer_trainers.measured("trl", recipe, steps)
            break
        except torch.multiprocessing.ProcessRaisedException as error:
            if "OutOfMemoryError" not in str(error) or micro == 1:
                raise
            micro = max(size for size in range(1, micro) if arguments.rows % size == 0)
    facts: dict[str, Any] = {"rows_at_once": micro, "attention": peer.attention, "liger": peer.has_liger, "packing": "bfd"}
    value = {"name": "trl SFTTrainer", "value": round(peer.tokens_per_s, 1), **facts}
    shared: dict[str, Any] = {"unit": "ratio", "device": device_name(), "runs": 1}
    speed = full.targets_per_s / peer.tokens_per_s
    report("gpu.vs_trl", speed, **shared, ours=round(full.targets_per_s, 1), peer=value, goal=TRL_GOAL)
    gib = {"name": "trl SFTTrainer", "value": round(peer.peak_memory / GIB, 2)}
    memory = full.peak_memory / peer.peak_memory
    report("gpu.memory_vs_trl", memory, **shared, ours=round(full.peak_memory / GIB, 2), peer=gib, goal=MEMORY_GOAL)


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
