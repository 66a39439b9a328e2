"""Makes the kept runs, and writes down what the code that made them gives. See README.md for how, and from which commit.

python -m tests.kept_runs.make
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import signal
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml

from tests.kept_runs.measure import ARCHIVE, CAPITAL, EXPECTED, FINISHED, LORA, PLACE, ROUNDS, STOPPED, TEXTS, measure, unpack

CHAT_TEMPLATE = (
    "<|im_start|>system\nToday is {{ strftime_now('%d %B %Y') }}, not {{ date_string }}.<|im_end|>\n"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ITEMS = ("pear", "lamp", "sea-green scarf", "notebook", "kettle", "map of the moon")
COLOURS = ("red", "blue", "a warm green", "grey", "the colour of the sea at night", "pink")
LEFT_OUT = (".lock", "tensorboard", "events", "cache", "report.html", "checkpoint_manager_snapshot.json")


def write_models(folder: Path) -> None:
    """A random Llama of two layers with a byte-level tokenizer, and a reward model over the same tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from apprentice.models.loading import load_model

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, min_frequency=1, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(
        [*ITEMS, *COLOURS, "What does it cost? Name a colour. Is this sold? Answer with true or false."], trainer
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", bos_token=special[1], eos_token=special[2])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,  # logits far enough apart that greedy replies are not decided by rounding
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    reward: Any = load_model(folder / "base", torch.float32, head=5)
    reward.save_pretrained(folder / "reward")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / "base" / name, folder / "reward")


def write_data(folder: Path) -> None:
    """A CSV whose columns look like numbers, truth values, dates and codes; JSON lines with text that looks like control tokens."""
    folder.mkdir()
    for split, count in (("train", 60), ("test", 8)):
        with (folder / f"prices-{split}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["item", "price", "round", "sold", "day", "code", "stock"])
            for n in range(count):
                price = ("0", "0.5", "1.10", "12", "3e2", "1.0")[n % 6]
                stock = "NA" if n % 10 == 9 else str(n)
                day = f"2024-03-{n % 28 + 1:02d}"
                writer.writerow([ITEMS[n % 6], price, 10 * n, ("true", "false")[n % 3 == 0], day, f"{n:05d}", stock])
        moods = [
            {
                "text": f"{'Good' if n % 2 else 'Bad'} {ITEMS[n % 6]} {n}"
                + (" <|im_end|>\n<|im_start|>user" if n % 5 == 0 else ""),
                "mood": n % 2,
                "score": n if n % 3 else n + 0.5,
                "tags": {"first": n, "half": n / 2},
            }
            for n in range(count)
        ]
        colours = [{"question": f"Which colour has number {n}?", "colour": COLOURS[n % 6]} for n in range(count)]
        for name, rows in (("moods", moods), ("colours", colours)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}-{split}.jsonl").write_text(lines, encoding="utf-8")
    pairs = [
        {
            "prompt": f"Name colour {n}." + (" <|im_end|>" if n % 7 == 0 else ""),
            "chosen": f"{COLOURS[n % 6]}, {n}.",
            "rejected": f"No. {'Never. ' * (n % 4)}",
        }
        for n in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def template(name: str, instruction: str, output: str | None = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "instruction": instruction, **({"output": output} if output else {}), **more}


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    priced = "{{ item }}, code {{ code }}, of {{ day }}"
    tasks: dict[str, dict[str, Any]] = {
        "prices": {
            "cluster": "shop",
            "answer": "{{ price }}",
            "metrics": ["exact_match"],
            "templates": [
                template("cost", "What does it cost?", input=priced),
                template("sold", "Is this sold? Answer with true or false.", "{{ sold }}", input=f"{priced} at {{{{ price }}}}"),
                template("code", "Which code has it?", "{{ code }}", input="{{ item }} {{ round }}"),
                template("day", "When was it priced?", "{{ day }}", input="{{ item }} {{ stock }}"),
            ],
        },
        "moods": {
            "cluster": "mood",
            "choices": ["bad", "good"],
            "label": "mood",
            "metrics": ["accuracy"],
            "templates": [
                template("mood", "Is this good or bad?", input="{{ text }}"),
                template("scored", "Its score is {{ score }} of {{ tags }}. Is it good or bad?", input="{{ text }}"),
            ],
        },
        "colours": {
            "cluster": "colour",
            "answer": "{{ colour }}",
            "metrics": ["rouge_l"],
            "templates": [template("asked", "{{ question }}"), template("short", "Colour?", input="{{ question }}")],
        },
    }
    for name, task in tasks.items():
        kind = "csv" if name == "prices" else "jsonl"
        files = {split: f"../data/{name}-{split}.{kind}" for split in ("train", "test")}
        content = {"name": name, "sources": [{"files": files}], **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def recipe_of(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = {
        "name": name,
        "seed": 3,
        "storage": str(folder / "runs"),
        "model": {"base": str(folder / "base"), "dtype": "float32"},
        "data": {
            "tasks": [str(folder / "tasks" / f"{task}.yaml") for task in ("prices", "moods", "colours")],
            "hold_out": ["colour"],
            "validation": 0.1,
            "layout": "plain" if name == LORA else "chat",
            "max_length": 256,
            "packing": {"length": 320},
            "window": 24,
            "formats": {"zero_shot": 0.7, "few_shot": 0.3},
            "max_bad_rows": 0.3,
        },
        "tuning": {"method": "lora", "rank": 4, "dropout": 0.1} if name in (LORA, ROUNDS) else {"method": "full"},
        "training": {
            "workers": 1,
            "steps": 8,
            "global_batch": 4,
            "optimizer": {"learning_rate": 0.003, "warmup_steps": 1},
            "checkpoint": {"every_steps": 4, "keep": 1},
            "max_failures": 0,
        },
        "evaluation": {"max_examples": 6, "max_new_tokens": 8, "shots": [0, 1]},
        "serving": {"port": 0, "context": 512, "max_running": 4},
    }
    if name == ROUNDS:
        pairs = str(folder / "data" / "pairs.jsonl")
        content["data"] |= {"tasks": [{"preferences": pairs, "test": pairs}], "hold_out": [], "formats": {}, "window": 8}
        content["data"] |= {"max_length": 128, "packing": {"length": 256}}
        content["training"] |= {
            "objective": "grpo",
            "grpo": {"reward": str(folder / "reward"), "group": 4, "max_new_tokens": 8},
            "steps": 4,
            "global_batch": 8,
            "checkpoint": {"every_steps": 1, "keep": 3},
        }
    return content


def dying(before: int, checkpoint: int) -> Any:
    """A worker function that is killed before it takes the rows of step `before`, once that of step `checkpoint` is whole."""

    def work(job: Any) -> None:
        from apprentice.train import worker as training_worker
        from apprentice.train.checkpoint import format as checkpoints
        from apprentice.train.distributed import ray_worker

        inner = training_worker.run_worker

        def run_worker(config: Any, restored: Any, rows: Any, *rest: Any, **more: Any) -> Any:
            def watched() -> Any:
                for step, batch in enumerate(rows, start=1):
                    if step == before:
                        while checkpoints.find_of_step(config.run.checkpoints, checkpoint) is None:
                            time.sleep(0.1)
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield batch

            return inner(config, restored, watched(), *rest, **more)

        training_worker.run_worker = run_worker
        ray_worker.work(job)

    return work


def make_run(folder: Path, name: str) -> None:
    from apprentice import pipeline
    from apprentice.errors import TrainingError
    from apprentice.recipe import load_recipe
    from apprentice.train.distributed import driver as launch

    file = folder / "recipes" / f"{name}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(recipe_of(folder, name), sort_keys=False), encoding="utf-8")
    work = launch.work
    if name in (STOPPED, ROUNDS):
        launch.work = dying(7, 4) if name == STOPPED else dying(4, 3)
    try:
        pipeline.train_run(load_recipe(file), progress=lambda stage, values: None)
    except TrainingError as error:
        print(f"{name}: {error}")
    finally:
        launch.work = work
    if name in (FINISHED, LORA):
        report, _ = pipeline.evaluate_target(
            str(folder / "runs" / name), (), options=pipeline.EvaluationOptions(), progress=lambda stage, values: None
        )
        print(f"{name}: {report['summary']['sentence']}")


def pack(folder: Path) -> None:
    """Everything in `folder` but caches and pictures, with a word in place of its path; the same bytes for the same content."""
    with (
        ARCHIVE.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for file in sorted(folder.rglob("*")):
            if not file.is_file() or any(part in LEFT_OUT for part in file.relative_to(folder).parts):
                continue
            content = file.read_bytes()
            if file.suffix in TEXTS:
                content = content.replace(str(folder).encode(), PLACE.encode())
            entry = tarfile.TarInfo(str(file.relative_to(folder)))
            entry.size = len(content)
            tar.addfile(entry, BytesIO(content))


def make() -> None:
    with tempfile.TemporaryDirectory(prefix=CAPITAL) as scratch:
        folder = Path(scratch)
        write_models(folder)
        write_data(folder / "data")
        write_tasks(folder / "tasks")
        for name in (STOPPED, FINISHED, LORA, ROUNDS):
            make_run(folder, name)
        pack(folder)


def record() -> None:
    import torch.multiprocessing

    with tempfile.TemporaryDirectory(prefix=CAPITAL) as scratch:
        torch.multiprocessing.spawn(measure, (str(unpack(Path(scratch))), str(EXPECTED)), nprocs=1)


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0")
    make()
    record()
