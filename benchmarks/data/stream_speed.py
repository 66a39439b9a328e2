"""Throughput of the data pipeline, against `datasets.map` with two processes and against the bare tokenizer.

Ours is the stream that training gets: rendered, tokenized, packed, in blocks of half a global batch, read in this process. The
peer renders the same task with the same code, uses the same tokenizer, and does not pack. Its rate is over the whole call.
Ours is measured from the first batch on, after Ray's actors have started, without the windows that they had in hand then;
`data.first_row_s` is the time before that. A second peer also packs as TRL does, best fit decreasing; the time to import TRL
is not counted.

    python -m benchmarks.data.stream_speed [--root ../shared/data] [--examples 65536] [--runs 5] [--layout chat]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from apprentice.data.corpus import Corpus, make_corpus
from apprentice.ray_cluster.session import ray_session
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder
from benchmarks.figures import compare, report

ROOT = Path(__file__).parents[2]

ACTORS = 2
GLOBAL_BATCH = 64


def recipe_of(options: argparse.Namespace, storage: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "storage": storage,
            "model": {"base": options.base},
            "data": {
                "root": str(Path(options.root).absolute()),
                "tasks": ["squad"],
                "layout": options.layout,
                "max_length": 1024,
                "packing": {"length": 2048},
                "window": options.window,
            },
            "training": {"workers": 2, "steps": 1, "global_batch": GLOBAL_BATCH},
        }
    )


class Ours:
    """One pass through our stream; also records the time to the first row of each pass."""

    def __init__(self, corpus: Corpus, windows: int) -> None:
        self.corpus, self.windows = corpus, windows
        self.first_row_s: list[float] = []

    def __call__(self) -> float:
        """Tokens/s of one pass."""
        from apprentice.data.stream import WINDOWS_PER_OBJECT, Start, train_stream

        in_hand = ACTORS * WINDOWS_PER_OBJECT
        begun = time.perf_counter()
        first, counted = 0.0, 0
        stream = train_stream(self.corpus, Start(), self.windows, ACTORS)
        for batch in stream.iter_batches(batch_size=GLOBAL_BATCH // 2, batch_format="numpy"):
            first = first or time.perf_counter()
            is_real = batch["segment_ids"] > 0
            counted += int(is_real[batch["window"] >= in_hand].sum())
        self.first_row_s.append(first - begun)
        return counted / (time.perf_counter() - first)


def datasets_map(options: argparse.Namespace, corpus: Corpus, *, packed: bool) -> float:
    """Tokens/s of `datasets.map` over as many examples; with `packed`, of TRL's best-fit packing of its result as well."""
    import datasets
    import numpy as np

    task, layout, backend = corpus.tasks[0], corpus.layout, bare_tokenizer(corpus)
    index = corpus.indices[task.name]
    assert index.train_source is not None
    datasets.disable_progress_bars()
    datasets.disable_caching()
    rows = datasets.Dataset.from_parquet(list(index.train_source.files), cache_dir=str(Folder.at(corpus.recipe.storage).local))
    rows = rows.select(np.resize(index.train, options.examples)).flatten_indices()

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        each = zip(zip(*batch.values(), strict=True), cycle(task.scored_templates), strict=False)
        examples = [task.render(dict(zip(batch, values, strict=True)), template) for values, template in each]
        texts = [layout.prompt(example.instruction, example.input) for example in examples]
        prompts = backend.encode_batch_fast(texts, add_special_tokens=False)
        answers = backend.encode_batch_fast([example.target for example in examples], add_special_tokens=False)
        ids = [[*prompt.ids, *answer.ids, *layout.end_ids] for prompt, answer in zip(prompts, answers, strict=True)]
        masks = [[0] * len(prompt) + [1] * (len(whole) - len(prompt)) for prompt, whole in zip(prompts, ids, strict=True)]
        return {"input_ids": ids, "completion_mask": masks}

    if packed:
        from trl.data_utils import pack_dataset
    begun = time.perf_counter()
    done = rows.map(tokenise, batched=True, num_proc=2, remove_columns=rows.column_names)
    if packed:
        done = pack_dataset(done, corpus.row_length, "bfd", {"batch_size": options.window})
    seconds = time.perf_counter() - begun
    tokens = sum(len(ids) for batch in done.iter(batch_size=1000) for ids in batch["input_ids"])
    return tokens / seconds


def bare_tokenizer(corpus: Corpus) -> Any:
    """The model's tokenizer as transformers loads it, without our additions."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(corpus.layout.tokenizer.folder).backend_tokenizer


def raw_tokenizer(corpus: Corpus, windows: int) -> Callable[[], float]:
    """A function for tokens/s of the tokenizer alone, on all cores, over the prompts of at most four windows."""
    from apprentice.data.encoding.render import Rendered, Renderer

    draws = corpus.plan.draws(0, min(windows, 4) * corpus.recipe.data.window)
    rendered = [item for item in Renderer(corpus.tasks, corpus.indices).render_draws(draws) if isinstance(item, Rendered)]
    prompts = [corpus.layout.prompt(item.example.instruction, item.example.input) for item in rendered]
    backend = bare_tokenizer(corpus)

    def run() -> float:
        begun = time.perf_counter()
        encoded = backend.encode_batch_fast(prompts, add_special_tokens=False)
        return sum(map(len, encoded)) / (time.perf_counter() - begun)

    return run


def in_own_process(options: argparse.Namespace, peer: str) -> Callable[[], float]:
    """A function that measures a peer in a fresh process, because it forks, which Ray's threads here would not survive."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.data.stream_speed",
        f"--peer={peer}",
        *(f"--{name}={value}" for name, value in vars(options).items() if name != "peer"),
    ]
    quiet = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    return lambda: float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet, cwd=ROOT).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures of the data pipeline, one JSON object a line.")
    parser.add_argument("--root", default=str(ROOT.parent / "shared" / "data"), help="holds squad/train.parquet")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="whose tokenizer is used")
    parser.add_argument("--layout", default="chat")
    parser.add_argument("--examples", type=int, default=65536)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer", choices=["map", "trl"], help="one run of a peer alone: prints its tokens a second")
    options = parser.parse_args()
    if not (Path(options.root) / "squad" / "train.parquet").is_file():
        for figure in ("data.vs_datasets_map", "data.vs_trl_packing", "data.vs_raw_tokenizer", "data.first_row_s"):
            report(figure, None, why=f"{options.root} has no squad/train.parquet")
        return
    with tempfile.TemporaryDirectory(prefix="apprentice-") as storage:
        recipe = recipe_of(options, storage)
        corpus = make_corpus(recipe, Run(Folder.at(storage) / recipe.name), parallel=False)
        if options.peer:
            print(datasets_map(options, corpus, packed=options.peer == "trl"))
        else:
            measure(options, corpus)


def measure(options: argparse.Namespace, corpus: Corpus) -> None:
    windows = options.examples // options.window
    ours = Ours(corpus, windows)
    with ray_session():
        ours()  # warm-up: worker processes start and modules are read from disk
        compare("data.vs_datasets_map", ours, "datasets.map np=2", in_own_process(options, "map"), runs=options.runs, goal=1.2)
        compare(
            "data.vs_trl_packing", ours, "datasets.map np=2 + TRL bfd", in_own_process(options, "trl"), runs=options.runs, goal=1.3
        )
        compare(
            "data.vs_raw_tokenizer",
            ours,
            "encode_batch_fast, all cores",
            raw_tokenizer(corpus, windows),
            runs=options.runs,
            goal=0.8,
        )
    report(
        "data.first_row_s", sorted(ours.first_row_s[1:])[len(ours.first_row_s) // 2 - 1], unit="s", runs=len(ours.first_row_s) - 1
    )


if __name__ == "__main__":
    main()
