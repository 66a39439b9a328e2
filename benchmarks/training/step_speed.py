"""Training: our run on Ray Train and DeepSpeed against a bare PyTorch loop, transformers' Trainer and TRL's SFTTrainer.

All have the same packed rows, model, dtype, processes and threads. Only steady steps count: start, checkpoints and validation
are left out on all sides. The ratio to the bare loop is the cost of Ray and DeepSpeed.

Further figures are the time to a run's first step, the share of a save that training waits for, and the memory of a process
against TRL's. DPO against TRL's is in dpo_speed.py, the two trainers are in peer_trainers.py.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from apprentice.data.stream import Corpus, make_corpus, render_window
from apprentice.models.loading import load_model, resolve_dtype
from apprentice.models.tuning.methods import TUNING_METHODS, trainable_parameters
from apprentice.ray_cluster.session import ray_session
from apprentice.recipe import Recipe
from apprentice.recipe.training import Checkpointing
from apprentice.run.folder import Run, open_run
from apprentice.train.batch import PackedRows
from apprentice.train.distributed.driver import train
from apprentice.train.engine.deepspeed_config import choose_micro_batch, rows_per_worker
from apprentice.train.losses.sft import SupervisedLoss
from apprentice.train.optimizer import adamw, learning_rate
from benchmarks.figures import claim_stdout, compare, report
from benchmarks.training import dpo_speed, peer_trainers

WARM_UP = 2  # first steps, which are not measured
GOAL, DPO_GOAL = 0.95, 1.2
TRAINER_GOAL, TRL_GOAL = 1.0, 1.5
STARTUP_GOAL_S, SAVE_GOAL, MEMORY_GOAL = 25.0, 0.1, 1.0  # seconds; share of a save; ratio to TRL's memory
MIB = 2**20


def recipe_of(arguments: argparse.Namespace, storage: str, name: str) -> Recipe:
    """A recipe on the built-in tasks, as in the quickstart, with the sizes in `arguments`."""
    return Recipe.model_validate(
        {
            "name": name,
            "seed": 1,
            "storage": storage,
            "model": {"base": arguments.model, "dtype": arguments.dtype, "attention": arguments.attention},
            "data": {
                "tasks": ["quickstart"],
                "max_length": arguments.length,
                "packing": {"length": arguments.length},
                "window": 256,
            },
            "tuning": {"method": arguments.method},
            "training": {
                "workers": arguments.workers,
                "steps": arguments.steps + WARM_UP,
                "global_batch": arguments.workers * arguments.rows,
                "optimizer": {"learning_rate": 1e-4, "warmup_steps": 1},
                "deepspeed": {"stage": arguments.stage},
                "checkpoint": {"every_steps": 1000, "keep": 1},
            },
        }
    )


def ours(arguments: argparse.Namespace, storage: str, number: int) -> float:
    """Target tokens/s of our run's steady steps."""
    recipe = recipe_of(arguments, storage, f"ours-{number}")
    run = open_run(recipe)
    train(recipe, run, make_corpus(recipe, run), progress=lambda _: None)
    records = [json.loads(line) for line in (run.folder / "steps.jsonl").read_text().splitlines()]
    steady = [record for record in records if record.get("step", 0) > WARM_UP and "loss" in record]
    return float(sum(record["target_tokens"] for record in steady) / sum(record["seconds"] for record in steady))


def startup_s(arguments: argparse.Namespace, storage: str, number: int) -> tuple[float, float]:
    """Seconds from the call until the first step begins, and until it ends."""
    recipe = recipe_of(arguments, storage, f"startup-{number}")
    run = open_run(recipe)
    corpus = make_corpus(recipe, run)
    steps: list[tuple[float, float]] = []
    begin = time.perf_counter()

    def seen(record: dict[str, Any]) -> None:
        if "loss" in record:
            steps.append((time.perf_counter() - begin, record["seconds"]))

    train(recipe, run, corpus, progress=seen)
    made_at, took = steps[0]
    return made_at - took, made_at


def save_block(arguments: argparse.Namespace, storage: str) -> tuple[float, float]:
    """Median seconds that training waits for a checkpoint, and that the checkpoint takes.

    Whole model with AdamW's state, saved during training.
    """
    recipe = recipe_of(arguments, storage, "saves")
    training = recipe.training.model_copy(update={"steps": 6, "checkpoint": Checkpointing(every_steps=2, keep=1)})
    recipe = recipe.model_copy(update={"tuning": recipe.tuning.model_copy(update={"method": "full"}), "training": training})
    run = open_run(recipe)
    train(recipe, run, make_corpus(recipe, run), progress=lambda _: None)
    records = [json.loads(line) for line in (run.folder / "steps.jsonl").read_text().splitlines()]
    saves = [record for record in records if "saved_s" in record and record["step"] < 6]
    return statistics.median(save["blocked_s"] for save in saves), statistics.median(save["saved_s"] for save in saves)


@dataclass(frozen=True)
class Bare:
    """Input of the bare loop's processes."""

    recipe: Recipe
    steps: list[PackedRows]
    folder: str


def bare_loop(arguments: argparse.Namespace, steps: list[PackedRows], storage: str) -> float:
    """Target tokens/s of the bare loop's steady steps: DistributedDataParallel over gloo, PyTorch's AdamW."""
    with tempfile.TemporaryDirectory() as folder:
        bare = Bare(recipe_of(arguments, storage, "bare"), steps, folder)
        file = Path(folder) / "bare.pickle"
        file.write_bytes(pickle.dumps(bare))
        torch.multiprocessing.spawn(bare_process, (str(file), arguments.workers), nprocs=arguments.workers)
        return float((Path(folder) / "speed").read_text())


def bare_process(rank: int, file: str, workers: int) -> None:
    """One process of the bare loop."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    bare: Bare = pickle.loads(Path(file).read_bytes())
    dist.init_process_group("gloo", init_method=f"file://{bare.folder}/store", rank=rank, world_size=workers)
    recipe, training = bare.recipe, bare.recipe.training
    dtype = resolve_dtype(recipe.model.dtype, "cpu")
    wrapped = TUNING_METHODS[recipe.tuning.method].wrap(load_model(recipe.model.base, dtype), recipe.tuning, recipe.seed).train()
    parameters = trainable_parameters(wrapped)
    optimizer = adamw(parameters, training.optimizer)
    model: Any = torch.nn.parallel.DistributedDataParallel(SupervisedLoss(wrapped))
    micro = choose_micro_batch(training, workers=workers, length=recipe.data.packing.length, on_gpu=False)
    rows = rows_per_worker(training, workers)
    targets, begin = 0, 0.0
    for step, whole in enumerate(bare.steps):
        if step == WARM_UP:
            begin = time.perf_counter()
        part = slice(rank * rows, (rank + 1) * rows)
        tables = (whole.input_ids, whole.positions, whole.segment_ids, whole.loss_mask)
        micros = PackedRows(*(table[part] for table in tables), whole.facts[part]).micro_batches(micro)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training.optimizer, step, step, len(bare.steps))
        optimizer.zero_grad()
        for number, batch in enumerate(micros, start=1):
            model.require_backward_grad_sync = number == len(micros)
            (model(batch) * (workers / whole.targets)).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), training.optimizer.clip)
        optimizer.step()
        targets += whole.targets if step >= WARM_UP else 0
    dist.barrier()
    if rank == 0:
        (Path(bare.folder) / "speed").write_text(str(targets / (time.perf_counter() - begin)))
    dist.destroy_process_group()


def first_steps(arguments: argparse.Namespace, storage: str) -> list[PackedRows]:
    """The packed rows of our first steps, for the peers."""
    recipe = recipe_of(arguments, storage, "rows")
    return steps_of(make_corpus(recipe, Run(open_run(recipe).folder), parallel=False), arguments.steps + WARM_UP)


def steps_of(corpus: Corpus, count: int) -> list[PackedRows]:
    """The packed rows of the first `count` steps, in the order in which our run takes them."""
    batch = corpus.recipe.training.global_batch
    columns: dict[str, list[Any]] = {}
    window = 0
    while len(columns.get("row", [])) < count * batch:
        for name, values in render_window(corpus, window).items():
            columns.setdefault(name, []).extend(values)
        window += 1
    cuts = (slice(start, start + batch) for start in range(0, count * batch, batch))
    return [PackedRows.from_columns({name: values[cut] for name, values in columns.items()}) for cut in cuts]


def measure_bare_loop(arguments: argparse.Namespace, storage: str, numbers: Iterator[int]) -> None:
    compare(
        "training.vs_bare_loop",
        lambda: ours(arguments, storage, next(numbers)),
        "bare PyTorch loop",
        partial(bare_loop, arguments, first_steps(arguments, storage), storage),
        runs=arguments.runs,
        goal=GOAL,
    )


def measure_peer(figure: str, name: str, goal: float, arguments: argparse.Namespace, storage: str, numbers: Iterator[int]) -> None:
    recipe, steps = recipe_of(arguments, storage, "peers"), first_steps(arguments, storage)
    compare(
        f"training.vs_{figure}",
        lambda: ours(arguments, storage, next(numbers)),
        name,
        lambda: peer_trainers.measured(figure, recipe, steps).tokens_per_s,
        runs=arguments.runs,
        goal=goal,
    )


def measure_memory(arguments: argparse.Namespace, storage: str, _: Iterator[int]) -> None:
    recipe = recipe_of(arguments, storage, "memory")
    run = open_run(recipe)
    mine = train(recipe, run, make_corpus(recipe, run), progress=lambda _: None).peak_memory
    assert mine is not None
    theirs = peer_trainers.measured("trl", recipe, first_steps(arguments, storage)).peak_memory
    peer = {"name": "trl SFTTrainer, packing", "mib": theirs // MIB}
    report("training.memory_vs_trl", mine / theirs, unit="ratio", ours_mib=mine // MIB, peer=peer, runs=1, goal=MEMORY_GOAL)


def measure_startup(arguments: argparse.Namespace, storage: str, _: Iterator[int]) -> None:
    begun, made = zip(*(startup_s(arguments, storage, number) for number in range(arguments.runs)), strict=True)
    value, first = statistics.median(begun), statistics.median(made)
    report("training.startup_s", value, unit="s", first_step_made_s=first, runs=arguments.runs, goal=STARTUP_GOAL_S)


def measure_save(arguments: argparse.Namespace, storage: str, _: Iterator[int]) -> None:
    blocked, took = save_block(arguments, storage)
    report("training.save_block", blocked / took, unit="ratio", blocked_s=blocked, save_s=took, runs=1, goal=SAVE_GOAL)


def measure_dpo(arguments: argparse.Namespace, storage: str, numbers: Iterator[int]) -> None:
    batch = dpo_speed.pairs_a_step(dpo_speed.corpus_of(arguments, storage))
    compare(
        "training.dpo_vs_trl",
        lambda: dpo_speed.ours(arguments, storage, f"dpo-{next(numbers)}"),
        "trl DPOTrainer",
        partial(dpo_speed.trl, arguments, storage, batch),
        runs=arguments.runs,
        goal=DPO_GOAL,
    )


MEASURES: dict[str, Callable[[argparse.Namespace, str, Iterator[int]], None]] = {
    "bare_loop": measure_bare_loop,
    "trainer": partial(measure_peer, "trainer", "transformers Trainer", TRAINER_GOAL),
    "trl": partial(measure_peer, "trl", "trl SFTTrainer, packing", TRL_GOAL),
    "memory": measure_memory,
    "startup": measure_startup,
    "save": measure_save,
    "dpo": measure_dpo,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--attention", default="auto", help="ours: auto attends each example by itself on CPUs; sdpa, through a mask"
    )
    parser.add_argument("--method", default="lora")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2, help="packed rows of one worker and step")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=list(MEASURES), help="one of the measurements")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage, ray_session():
        numbers = count()
        for name, measure in MEASURES.items():
            if arguments.only in (None, name):
                measure(arguments, storage, numbers)


if __name__ == "__main__":
    claim_stdout()
    main()
