"""Scaling of the data stream: growing datasets, positions far into a run, and packing of a real mixture.

`data.packing_efficiency`   real tokens per token of the rows of `flan_mini` at 2,048 tokens, over eight windows
`data.resume_ratio`         time to the first window at position 10**8 against that at 0, each in a fresh renderer; 1 is the same
`data.memory_20x`           peak memory of a process that indexes SQuAD and renders windows of it, 20 times the rows against once

    python -m benchmarks.data.growth [--root ../shared/data] [--runs 5]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from apprentice.data.corpus import Corpus, make_corpus
from apprentice.data.window import WindowRenderer
from apprentice.recipe import Recipe, find_recipe, load_recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder
from benchmarks.figures import report

ROOT = Path(__file__).parents[2]

FAR = 10**8
GROWTH = 20
WINDOWS = 8


def corpus_of(recipe: Recipe) -> Corpus:
    return make_corpus(recipe, Run(Folder.at(recipe.storage) / recipe.name), parallel=False)


def packing_efficiency(corpus: Corpus) -> float:
    renderer = WindowRenderer(corpus)
    windows = [renderer.window(number)["segment_ids"] > 0 for number in range(WINDOWS)]
    return float(sum(int(real.sum()) for real in windows) / sum(real.size for real in windows))


def first_window_s(corpus: Corpus, position: int) -> float:
    began = time.perf_counter()
    WindowRenderer(corpus).window(position // corpus.recipe.data.window)
    return time.perf_counter() - began


def resume_ratio(corpus: Corpus, runs: int) -> float:
    first_window_s(corpus, 0)  # warm-up: the tokenizer is read, and files enter the system's cache
    return statistics.median(first_window_s(corpus, FAR + run * 10**6) / first_window_s(corpus, 0) for run in range(runs))


def grown(root: Path, times: int, folder: Path) -> Path:
    """Writes SQuAD's training rows `times` over, in row groups of 1,000 rows, and its test rows; returns `folder`."""
    rows = pq.read_table(root / "squad" / "train.parquet")
    (folder / "squad").mkdir(parents=True)
    with pq.ParquetWriter(folder / "squad" / "train.parquet", rows.schema) as writer:
        for _ in range(times):
            writer.write_table(rows, row_group_size=1000)
    shutil.copy(root / "squad" / "test.parquet", folder / "squad")
    return folder


def peak_mib(root: Path, storage: Path) -> float:
    """Peak memory of a fresh process that runs `render_some`, in MiB."""
    command = [sys.executable, "-m", "benchmarks.data.growth", "--memory", "--root", str(root), "--storage", str(storage)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout)


def render_some(root: str, storage: str) -> None:
    data = {"root": root, "tasks": ["squad"], "max_length": 1024, "packing": {"length": 2048}}
    content = {"name": "memory", "storage": storage, "model": {"base": "smollm2-135m-instruct"}, "data": data}
    corpus = corpus_of(Recipe.model_validate(content | {"training": {"steps": 1}}))
    renderer = WindowRenderer(corpus)
    for window in range(2 * WINDOWS):
        renderer.window(window)
    # VmHWM counts this program alone; getrusage would also count the process before its exec.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures of the data stream as data grows, one JSON object a line.")
    parser.add_argument("--root", default=str(ROOT.parent / "shared" / "data"), help="holds squad/train.parquet")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--storage", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help="one process of the memory figure: prints its peak in MiB")
    options = parser.parse_args()
    if options.memory:
        render_some(options.root, options.storage)
        return
    root = Path(options.root).absolute()
    if not (root / "squad" / "train.parquet").is_file():
        for figure in ("data.packing_efficiency", "data.resume_ratio", "data.memory_20x"):
            report(figure, None, why=f"{root} has no squad/train.parquet")
        return
    with tempfile.TemporaryDirectory(prefix="apprentice-") as folder:
        changes = [f"data.root={root}", f"storage={folder}", "data.packing.length=2048", "data.max_length=1024"]
        corpus = corpus_of(load_recipe(find_recipe("flan_mini"), changes))
        value = packing_efficiency(corpus)
        report("data.packing_efficiency", value, unit="real tokens per token", recipe="flan_mini", length=2048, runs=1, goal=0.97)
        report("data.resume_ratio", resume_ratio(corpus, options.runs), unit="ratio", position=FAR, runs=options.runs, goal=1.2)
        once, more = (
            peak_mib(grown(root, times, Path(folder) / f"rows{times}"), Path(folder) / f"storage{times}") for times in (1, GROWTH)
        )
        report("data.memory_20x", more / once, unit="ratio", mib_once=round(once), mib_20x=round(more), runs=1, goal=1.3)


if __name__ == "__main__":
    main()
