"""Comparison of tuning methods: `python -m benchmarks.learning.claims methods`.

One recipe for each method, with the same tokens and data.

For each method: the number of trained parameters, the peak memory of the worker processes, tokens/s, sizes on disk, and the
scores of base and tuned model on trained-on and held-out tasks. Prints one JSON object for each method; writes `methods.md`
and `methods.svg`. A second call does not repeat what is trained and evaluated; it takes the memory from `methods.json` of the
first.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from apprentice import pipeline
from apprentice.models.loading import load_model, resolve_dtype
from apprentice.models.tuning.methods import TUNING_METHODS, count_trainable
from apprentice.recipe import Recipe, find_recipe, load_recipe
from apprentice.run.folder import Run, open_run
from benchmarks.figures import report

RECIPES = ("full", "lora", "adapter_tuning", "prefix_tuning", "prompt_tuning")
POOLS = {"trained_on_ranked": "#0f609b", "trained_on_generated": "#2c7a7b", "held_out_ranked": "#c05621"}
MIB = 1024 * 1024
Line = dict[str, Any]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="claims.py methods", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--out", type=Path, default=Path("reports/methods"))
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    chosen = parser.parse_intermixed_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    known = chosen.out / "methods.json"
    lines: dict[str, Line] = json.loads(known.read_text()) if known.exists() else {}
    for name in chosen.recipes:
        recipe = load_recipe(find_recipe(name), chosen.overrides)
        lines[name] = line_of(recipe, lines.get(name, {}))
        known.write_text(json.dumps(lines, indent=2), encoding="utf-8")
        report(f"claims.methods.{name}", lines[name]["tokens_per_s"], unit="tokens/s", **lines[name])
    shown = {name: lines[name] for name in chosen.recipes}
    (chosen.out / "methods.md").write_text(table_of(shown), encoding="utf-8")
    (chosen.out / "methods.svg").write_text(picture_of(shown), encoding="utf-8")


def line_of(recipe: Recipe, earlier: Mapping[str, Any]) -> Line:
    """Trains and evaluates one method; `earlier` is its record of an earlier call, for the memory, which only training shows."""

    def progress(stage: str, values: Mapping[str, Any]) -> None:
        if values.get("done"):
            shown = {key: value for key, value in values.items() if key != "done"}
            print(f"{recipe.name}: {stage} {shown}", file=sys.stderr, flush=True)

    run = open_run(recipe)
    with PeakMemory() as memory:
        trained = pipeline.train_run(recipe, progress=progress)
    memory_mib = earlier.get("memory_mib") if trained["already"] else memory.peak / MIB
    document = pipeline.evaluate_run(recipe, progress=progress)[0]
    return {**trained_of(recipe), "memory_mib": memory_mib, **facts_of(run), "pools": pools_of(document)}


def trained_of(recipe: Recipe) -> Line:
    """Number of trained parameters, and their share of all."""
    model = load_model(recipe.model.base, resolve_dtype(recipe.model.dtype, "cpu"), trust=recipe.model.trust)
    numbers, share = count_trainable(TUNING_METHODS[recipe.tuning.method].wrap(model, recipe.tuning, recipe.seed))
    return {"trained": numbers, "trained_share": share}


def facts_of(run: Run) -> Line:
    """Speed over the steady steps, and sizes on disk: of the largest checkpoint, and of the adapter, or else the model."""
    training = run.status()["training"]
    checkpoints = [folder for folder in run.checkpoints.local.iterdir() if folder.is_dir()]
    kept = run.adapter.local if run.adapter.exists() else run.model.local
    return {
        "tokens": training["tokens"],
        "tokens_per_s": training["tokens_per_s"],
        "checkpoint_mib": max(map(_size, checkpoints)) / MIB,
        "kept_mib": _size(kept) / MIB,
    }


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def pools_of(document: Mapping[str, Any]) -> dict[str, Line]:
    """Pool of tasks → base and tuned mean, and their difference with its interval."""
    tuned = document["columns"][-1]["key"]
    base = document["columns"][-1]["against"]
    return {
        f"{'held_out' if pool['held_out'] else 'trained_on'}_{pool['kind']}": {
            "tasks": pool["tasks"],
            "base": pool["columns"][base]["mean"],
            "tuned": pool["columns"][tuned]["mean"],
            "difference": pool["differences"][tuned]["mean"],
            "interval": pool["differences"][tuned]["interval"],
        }
        for pool in document["pools"]
        if tuned in pool["differences"]
    }


class PeakMemory:
    """Peak memory of the training workers below this process, all together, in bytes, sampled each second.

    Measured as proportional set size, which counts pages that processes share once.
    """

    def __init__(self) -> None:
        self.peak = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            self.peak = max(self.peak, sum(map(_held, psutil.Process().children(recursive=True))))


def _held(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss) if "TrainWorker" in " ".join(process.cmdline()) else 0
    except psutil.Error:  # the process has ended
        return 0


def table_of(lines: Mapping[str, Line]) -> str:
    """One row for each method, as GitHub Markdown."""
    pools = [pool for pool in POOLS if any(pool in line["pools"] for line in lines.values())]
    head = [
        "method",
        "trained",
        "memory of the workers",
        "tokens/s",
        "checkpoint",
        "kept",
        *(pool.replace("_", " ") for pool in pools),
    ]
    rows = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    first = next(iter(lines.values()))
    base = [f"{first['pools'][pool]['base']:.1f}" for pool in pools]
    rows.append(f"| base | {' | '.join(['–'] * 5 + base)} |")
    for name, line in lines.items():
        memory = "–" if line["memory_mib"] is None else f"{line['memory_mib'] / 1024:.1f} GiB"
        cells = [
            f"{line['trained']:,} ({line['trained_share']:.2%})",
            memory,
            f"{line['tokens_per_s']:.0f}",
            f"{line['checkpoint_mib']:.1f} MiB",
            f"{line['kept_mib']:.1f} MiB",
            *(_score(line["pools"][pool]) for pool in pools),
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _score(pool: Line) -> str:
    low, high = pool["interval"]
    return f"{pool['tuned']:.1f}: {pool['difference']:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "−")


def picture_of(lines: Mapping[str, Line]) -> str:
    """Two panels as SVG text: the gain over the base with its interval, and tokens/s."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    names = list(lines)
    figure = Figure(figsize=(10, 1.3 + 0.55 * len(names)), layout="constrained")
    FigureCanvasSVG(figure)
    gain, speed = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    for shift, (pool, colour) in enumerate(POOLS.items()):
        pool_scores = [(place, lines[name]["pools"][pool]) for place, name in enumerate(names) if pool in lines[name]["pools"]]
        heights = [place + 0.22 * (shift - 1) for place, _ in pool_scores]
        for height, (_, scores) in zip(heights, pool_scores, strict=True):
            gain.plot(scores["interval"], [height, height], color=colour, linewidth=1.6)
        gain.plot(
            [scores["difference"] for _, scores in pool_scores],
            heights,
            "o",
            color=colour,
            markersize=5,
            label=pool.replace("_", " "),
        )
    gain.axvline(0, color="#7b8794", linewidth=0.8)
    gain.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    gain.set_ylim(len(names) - 0.5, -0.5)
    gain.set_xlabel("tuned − base, points, 95% interval")
    gain.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(POOLS), frameon=False, fontsize="small")
    speed.barh(range(len(names)), [line["tokens_per_s"] for line in lines.values()], color="#9fb3c8", height=0.6)
    speed.set_xlabel("tokens/s")
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
