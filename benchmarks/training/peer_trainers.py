"""Peers of our training loop: transformers' Trainer and TRL's SFTTrainer on the examples of the same packed rows.

Weights, dtype, LoRA, rows of a step, processes and threads are the same. Trainer gets our rows as they are; TRL packs the
examples itself. Only steady steps count, and only target tokens.

On a GPU, TRL runs as its users run it: packing, bfloat16 products over float32 weights (its default; over bfloat16 weights with
LoRA), and flash attention and Liger's kernels where these packages are installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing

from apprentice.models.attention.backend_choice import PackedCompute
from apprentice.models.loading import load_model, resolve_dtype
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.pretrained.hub import local_folder
from apprentice.recipe import Recipe
from apprentice.train.batch import PackedRows
from apprentice.train.compat import attention_name
from apprentice.train.engine.deepspeed_config import choose_micro_batch, rows_per_worker
from apprentice.train.memory.measure import peak_memory

WARM_UP = 2  # first steps, which are not measured


@dataclass(frozen=True)
class Job:
    """Input of a peer's processes; `steps` are the packed rows of our steps."""

    peer: str
    recipe: Recipe
    steps: list[PackedRows]
    folder: str


class Measured(NamedTuple):
    """Speed in target tokens/s, and the peak memory, in bytes, of the process with the most: resident, or on its GPU."""

    tokens_per_s: float
    peak_memory: int
    attention: str
    has_liger: bool


def measured(peer: str, recipe: Recipe, steps: list[PackedRows]) -> Measured:
    """Trains `peer` ("trainer" or "trl") on `steps`, in as many processes as the recipe has workers."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.pickle"
        file.write_bytes(pickle.dumps(Job(peer, recipe, steps, folder)))
        workers = recipe.training.max_workers
        torch.multiprocessing.spawn(_process, (str(file), workers), nprocs=workers)
        return Measured(*json.loads((Path(folder) / "measured").read_text()))


def _process(rank: int, file: str, workers: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    job: Job = pickle.loads(Path(file).read_bytes())
    if workers > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        dist.init_process_group("gloo", init_method=f"file://{job.folder}/store", rank=rank, world_size=workers)
    with contextlib.redirect_stdout(sys.stderr):  # the peers print their metrics, and standard output is for our figures
        trainer = _trl(job, workers) if job.peer == "trl" else _trainer(job, workers)
        targets, seconds = _run(trainer, device_of(job.recipe))
    total, most = torch.tensor([targets], dtype=torch.float64), torch.tensor([peak_memory(device_of(job.recipe))])
    if workers > 1:
        dist.all_reduce(total)
        dist.all_reduce(most, dist.ReduceOp.MAX)
    if rank == 0:
        measurement = Measured(float(total) / seconds, int(most), attention_name(trainer.model), trainer.args.use_liger_kernel)
        (Path(job.folder) / "measured").write_text(json.dumps(measurement))


def device_of(recipe: Recipe) -> torch.device:
    """The device that `recipe` asks for."""
    return torch.device("cuda", 0) if recipe.training.resources.gpus else torch.device("cpu")


def time_on(device: torch.device) -> float:
    """The time in seconds, once `device` has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _run(trainer: Any, device: torch.device) -> tuple[int, float]:
    """Target tokens of this process, and seconds, over the steps after the warm-up."""
    targets: list[Any] = []  # numbers on the device, which are read after the last step
    begin: list[float] = []
    inner = trainer.training_step

    def training_step(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        if trainer.state.global_step == WARM_UP and not begin:
            begin.append(time_on(device))
        if trainer.state.global_step >= WARM_UP:
            targets.append((inputs["labels"][..., 1:] != -100).sum())
        return inner(model, inputs, *rest, **more)

    trainer.training_step = training_step
    trainer.train()
    seconds = time_on(device) - begin[0]
    return sum(map(int, targets)), seconds


def _arguments(job: Job, workers: int) -> dict[str, Any]:
    training = job.recipe.training
    on_gpu = training.resources.gpus > 0
    micro = choose_micro_batch(training, workers=workers, length=job.recipe.data.packing.length, on_gpu=on_gpu)
    return {
        "output_dir": job.folder,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": rows_per_worker(training, workers) // micro,
        "max_steps": len(job.steps),
        "learning_rate": training.optimizer.learning_rate,
        "max_grad_norm": training.optimizer.clip,
        "bf16": on_gpu,
        "use_liger_kernel": on_gpu and find_spec("liger_kernel") is not None,
        "use_cpu": not on_gpu,
        "ddp_backend": "gloo" if workers > 1 else None,
        "gradient_checkpointing": training.activation_checkpointing,
        "dataloader_pin_memory": on_gpu,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 10**6,
        "disable_tqdm": True,
    }


def _model(job: Job) -> Any:
    model = job.recipe.model
    if not job.recipe.training.resources.gpus:
        return load_model(model.base, resolve_dtype(model.dtype, "cpu"))
    dtype = torch.float32 if job.recipe.tuning.method == "full" else torch.bfloat16
    packed = PackedCompute.on(torch.device("cuda"), torch.bfloat16)
    return load_model(model.base, dtype, "flash" if find_spec("flash_attn") is not None else "sdpa", packed=packed)


def _trainer(job: Job, workers: int) -> Any:
    from transformers import Trainer, TrainingArguments

    rows = [
        {
            "input_ids": torch.from_numpy(step.input_ids[at].astype("int64")),
            "position_ids": torch.from_numpy(step.positions[at].astype("int64")),
            "labels": torch.from_numpy(step.input_ids[at].astype("int64")).masked_fill(
                torch.from_numpy(step.loss_mask[at] == 0), -100
            ),
        }
        for step in job.steps
        for at in range(len(step))
    ]
    tuned = TUNING_METHODS[job.recipe.tuning.method].wrap(_model(job), job.recipe.tuning, job.recipe.seed).train()
    data: Any = rows
    return Trainer(model=tuned, args=TrainingArguments(**_arguments(job, workers)), train_dataset=data)


def _trl(job: Job, workers: int) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    length = job.recipe.data.packing.length
    more = {"packing": True, "max_length": length, "completion_only_loss": True}
    tuning = job.recipe.tuning
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=tuning.rank, lora_alpha=int(tuning.alpha or 2 * tuning.rank), target_modules="all-linear"
    )
    return SFTTrainer(
        model=_model(job),
        args=SFTConfig(**_arguments(job, workers), **more),
        train_dataset=Dataset.from_list(examples(job.steps)),
        processing_class=AutoTokenizer.from_pretrained(local_folder(job.recipe.model.base)),
        peft_config=lora if tuning.method == "lora" else None,
    )


def examples(steps: list[PackedRows]) -> list[dict[str, list[int]]]:
    """The examples of all rows: their token ids, and which of these are targets."""
    trl_examples = []
    for step in steps:
        for ids, segments, mask in zip(step.input_ids, step.segment_ids, step.loss_mask, strict=True):
            for segment in range(1, int(segments.max()) + 1):
                here = segments == segment
                trl_examples.append({"input_ids": ids[here].tolist(), "completion_mask": mask[here].astype(int).tolist()})
    return trl_examples
