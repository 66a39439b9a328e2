"""DPO training: our run against TRL's DPOTrainer, in pairs/s, on the same pairs and model, one process with one thread.

The pairs are the built-in tasks' questions, each with its answer and the answer to another question. Both sides pay for the
reference model: TRL in every step, ours in a pass of its own, whose seconds for each pair are added. Only steady steps count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from apprentice.data.stream import Corpus, make_corpus, render_window
from apprentice.models.loading import load_model, resolve_dtype
from apprentice.pretrained.hub import local_folder
from apprentice.recipe import Recipe
from apprentice.run.folder import Run, open_run
from apprentice.tasks.builtin import rows
from apprentice.tasks.registry import find_tasks
from apprentice.train.batch import PackedRows
from apprentice.train.distributed.driver import train
from apprentice.train.engine.deepspeed_config import choose_micro_batch
from apprentice.train.losses.preference import answer_log_probabilities
from apprentice.train.losses.target_losses import TargetLosses

WARM_UP = 2  # first steps, which are not measured
RATE, RANK = 1e-4, 16


def write_pairs(file: Path) -> list[dict[str, str]]:
    """Writes preference records on the questions of all built-in tasks, interleaved, as JSON lines; returns them."""
    numbered_pairs = []
    for task in find_tasks("quickstart", file.parent):
        template = task.scored_templates[0]
        examples = [task.render(row, template) for row in rows(task.name, "train")]
        for number, example in enumerate(examples):
            other = next(later for later in examples[number + 1 :] + examples if later.target != example.target)
            prompt = "\n\n".join(part for part in (example.instruction, example.input) if part)
            numbered_pairs.append((number, {"prompt": prompt, "chosen": example.target, "rejected": other.target}))
    records = [record for _, record in sorted(numbered_pairs, key=lambda pair: pair[0])]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def recipe_of(arguments: argparse.Namespace, storage: str, name: str, steps: int) -> Recipe:
    """A recipe for one worker on the pairs in `storage`."""
    return Recipe.model_validate(
        {
            "name": name,
            "seed": 1,
            "storage": storage,
            "model": {"base": arguments.model, "dtype": arguments.dtype},
            "data": {
                "tasks": [{"preferences": f"{storage}/pairs.jsonl"}],
                "validation": 0.0,
                "max_length": arguments.length // 2,
                "packing": {"length": arguments.length},
                "mixture": {"max_rows": 512},
                "window": 256,
            },
            "tuning": {"method": "lora", "rank": RANK},
            "training": {
                "objective": "dpo",
                "workers": 1,
                "steps": steps,
                "global_batch": 4,
                "optimizer": {"learning_rate": RATE, "schedule": "constant"},
                "checkpoint": {"every_steps": 1000, "keep": 1},
            },
        }
    )


def ours(arguments: argparse.Namespace, storage: str, name: str) -> float:
    """Pairs/s of our run's steady steps, with the reference pass included."""
    recipe = recipe_of(arguments, storage, name, arguments.steps + WARM_UP)
    run = open_run(recipe)
    corpus = make_corpus(recipe, run)
    train(recipe, run, corpus, progress=lambda _: None)
    records = [json.loads(line) for line in (run.folder / "steps.jsonl").read_text().splitlines()]
    steady = [record for record in records if record.get("step", 0) > WARM_UP and "loss" in record]
    pairs = sum(len(record["examples"]) for record in steady)
    return pairs / (sum(record["seconds"] for record in steady) + pairs * reference_seconds(corpus))


def reference_seconds(corpus: Corpus) -> float:
    """Seconds of the reference pass for one pair, over the packed rows of the first window."""
    recipe = corpus.recipe
    dtype = resolve_dtype(recipe.model.dtype, "cpu")
    torch.set_num_threads(1)
    targets = TargetLosses(load_model(recipe.model.base, dtype).eval())
    packed = PackedRows.from_columns(render_window(corpus, 0))
    size = choose_micro_batch(recipe.training, workers=1, length=corpus.row_length, on_gpu=False)
    batches: list[Any] = packed.micro_batches(size)[:5]
    with torch.no_grad():
        answer_log_probabilities(targets, batches[0])  # warm-up
        begin = time.perf_counter()
        for batch in batches[1:]:
            answer_log_probabilities(targets, batch)
        seconds = time.perf_counter() - begin
    return seconds / sum(len(batch.reference) // 2 for batch in batches[1:])


def pairs_a_step(corpus: Corpus) -> int:
    """Mean number of pairs in one of our steps, as TRL's batch size."""
    pair_counts = [len(examples) for examples in render_window(corpus, 0)["examples"]]
    return max(1, round(corpus.recipe.training.global_batch * sum(pair_counts) / len(pair_counts)))


def trl(arguments: argparse.Namespace, storage: str, batch: int) -> float:
    """Pairs/s of TRL's steady steps, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(trl_process, (arguments, storage, batch, folder), nprocs=1)
        return float((Path(folder) / "speed").read_text())


def trl_process(_: int, arguments: argparse.Namespace, storage: str, batch: int, folder: str) -> None:
    """The peer's process: same weights, dtype, LoRA and learning rate; the reference is the model without its adapter."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    lines = (Path(storage) / "pairs.jsonl").read_text().splitlines()
    needed = [json.loads(line) for line in lines][: batch * (arguments.steps + WARM_UP)]
    trl_rows = [
        {
            "prompt": [{"role": "user", "content": record["prompt"]}],
            "chosen": [{"role": "assistant", "content": record["chosen"]}],
            "rejected": [{"role": "assistant", "content": record["rejected"]}],
        }
        for record in needed
    ]

    class Clock(TrainerCallback):
        begin = end = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.end = time.perf_counter()
            if state.global_step == WARM_UP:
                self.begin = self.end

    place = local_folder(arguments.model)
    dtype = resolve_dtype(arguments.dtype, "cpu")
    clock = Clock()
    config = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        max_steps=arguments.steps + WARM_UP,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_length=arguments.length // 2,
        beta=0.1,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=load_model(place, dtype),
        args=config,
        train_dataset=Dataset.from_list(trl_rows),
        processing_class=AutoTokenizer.from_pretrained(place),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
        callbacks=[clock],
    )
    with contextlib.redirect_stdout(sys.stderr):  # TRL prints its metrics, and standard output is for our figures
        trainer.train()
    speed = batch * arguments.steps / (clock.end - clock.begin)
    assert math.isfinite(speed)
    (Path(folder) / "speed").write_text(str(speed))


def corpus_of(arguments: argparse.Namespace, storage: str) -> Corpus:
    """The corpus of our runs; writes the pairs first."""
    write_pairs(Path(storage) / "pairs.jsonl")
    recipe = recipe_of(arguments, storage, "pairs", arguments.steps + WARM_UP)
    return make_corpus(recipe, Run(open_run(recipe).folder), parallel=False)
