"""Claims of instruction tuning, tested on a small scale: the tables on learning in docs/results.md, with intervals.

    python -m benchmarks.learning.claims [--recipe flan_mini] [--hold-out sentiment nli] [--clusters 2 5 0] [--out DIR]
                                         [KEY=VALUE …]
    python -m benchmarks.learning.claims methods …      # full, LoRA, prefix, prompt and adapter tuning side by side: methods.py

(a) base against tuned model, on tasks trained on and on each held-out cluster;
(b) T0's question: one wording for each task against all; held-out tasks are asked in every wording: mean, worst, spread;
(c) FLAN's question: the number of clusters trained on (0 means all).

Each variant is a run of its own, trained and evaluated by the ordinary pipeline; a second call repeats nothing that is done.
Prints one JSON object for each figure, and writes `claims.md` and `claims.svg`. `--dry-run` only lists the variants.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from apprentice import pipeline
from apprentice.recipe import Recipe, dump_recipe, find_recipe, load_recipe
from apprentice.tasks.registry import select_tasks
from apprentice.tasks.schema import Task
from benchmarks.figures import claim_stdout, report
from benchmarks.learning import methods

Variants = dict[str, Recipe]
_ONE_WORDING = "{}-one-wording"


def main() -> None:
    if sys.argv[1:2] == ["methods"]:
        methods.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--recipe", default="flan_mini")
    parser.add_argument("--hold-out", nargs="+", default=["sentiment", "nli"], help="clusters held out, each in runs of its own")
    parser.add_argument("--clusters", nargs="+", type=int, default=[2, 5, 0], help="numbers of clusters for (c); 0 is all")
    parser.add_argument("--out", type=Path, default=Path("reports/claims"))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    chosen = parser.parse_intermixed_args()
    recipe = load_recipe(find_recipe(chosen.recipe), chosen.overrides)
    chosen.out.mkdir(parents=True, exist_ok=True)
    variants = variants_of(recipe, chosen.hold_out, chosen.clusters, chosen.out)
    if chosen.dry_run:
        for name, variant in variants.items():
            print(name, *variant.data.tasks, file=sys.stderr)
        return
    reports = {name: _scored(name, variant) for name, variant in variants.items()}
    rows = [row for name, document in reports.items() for row in figures_of(name, document)]
    for row in rows:
        report(
            f"claims.{row['variant']}.{row['pool']}", row["difference"], unit="points", interval=row["interval"], base=row["base"],
            tuned=row["tuned"], spread=row["spread"], tasks=row["tasks"],
        )  # fmt: skip
    all_wordings = {
        name: _every_wording(variants[name], chosen.out) for name in (next(iter(variants)), _ONE_WORDING.format(recipe.name))
    }
    lines = [line for name, document in all_wordings.items() for line in wordings_of(name, document)]
    for line in lines:
        report(f"claims.wordings.{line['variant']}.{line['model']}", line["mean"], unit="points", **line)
    (chosen.out / "claims.md").write_text(f"{table_of(rows)}\n{table_of_wordings(lines)}", encoding="utf-8")
    (chosen.out / "claims.svg").write_text(picture_of(rows), encoding="utf-8")


def variants_of(recipe: Recipe, hold_out: Sequence[str], clusters: Sequence[int], folder: Path) -> Variants:
    """Run name → recipe of every variant.

    All data for each held-out cluster; then, with the first of these held out, one wording for each task, and fewer clusters.
    """
    tasks, _ = select_tasks(recipe.data.tasks, (), Path.cwd())
    variants = {f"{recipe.name}-without-{cluster}": _variant(recipe, tasks, cluster, "") for cluster in hold_out}
    first = hold_out[0]
    variants[_ONE_WORDING.format(recipe.name)] = _variant(recipe, _one_wording(tasks, first, folder), first, "one-wording")
    order = list(dict.fromkeys(task.cluster for task in tasks if first not in (task.cluster, task.name)))
    for number in clusters:
        if 0 < number < len(order):  # the first variant has all of them
            kept = [task for task in tasks if task.cluster in order[:number] or first in (task.cluster, task.name)]
            variants[f"{recipe.name}-{number}-clusters"] = _variant(recipe, kept, first, f"{number}-clusters")
    return {name: variant.model_copy(update={"name": name}) for name, variant in variants.items()}


def _variant(recipe: Recipe, tasks: Sequence[Task | str], cluster: str, kind: str) -> Recipe:
    names = tuple(task if isinstance(task, str) else task.name for task in tasks) if kind else recipe.data.tasks
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tasks": names, "hold_out": (cluster,)})})


def _one_wording(tasks: Sequence[Task], held_out: str, folder: Path) -> list[Task | str]:
    """The tasks with one wording each, as files in `folder`; held-out tasks keep all theirs, since they are only scored."""
    entries: list[Task | str] = []
    for task in tasks:
        if held_out in (task.cluster, task.name):
            entries.append(task)
            continue
        first = task.scored_templates[0]
        file = (folder / f"{task.name}.yaml").absolute()
        content = task.model_copy(update={"templates": (first,)}).model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        file.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        entries.append(str(file))
    return entries


def _scored(name: str, recipe: Recipe) -> dict[str, Any]:
    """Trains a run, unless it is trained, and evaluates it; returns its report."""
    print(f"{name}: {len(dump_recipe(recipe).splitlines())} lines of recipe", file=sys.stderr)

    def progress(stage: str, values: Mapping[str, Any]) -> None:
        if values.get("done"):
            shown = {key: value for key, value in values.items() if key != "done"}
            print(f"{name}: {stage} {shown}", file=sys.stderr, flush=True)

    pipeline.train_run(recipe, progress=progress)
    return pipeline.evaluate_run(recipe, progress=progress)[0]


def _every_wording(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Evaluates a trained variant on its held-out tasks, each row in every wording; returns the report."""
    _, held_out = select_tasks(recipe.data.tasks, recipe.data.hold_out, Path.cwd())
    names = tuple(sorted(held_out))
    data = recipe.data.model_copy(update={"tasks": names, "hold_out": names})
    evaluation = recipe.evaluation.model_copy(update={"templates_per_row": "all", "shots": (0,), "baseline_shots": (0,)})
    variant_recipe = recipe.model_copy(update={"data": data, "evaluation": evaluation})
    options = pipeline.EvaluationOptions(out=folder / f"{recipe.name}-wordings")
    return pipeline.evaluate_run(variant_recipe, options=options, progress=lambda stage, values: None)[0]


def wordings_of(variant: str, document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores of base and tuned model over all wordings of the held-out tasks: mean, worst and spread, averaged over tasks."""
    keys = [column["key"] for column in document["columns"] if column["subject"] != "majority"]
    return [
        {"variant": variant, "model": key.split("@")[0], "tasks": pool["tasks"], "mean": cell["mean"]}
        | {name: cell[name] for name in ("worst", "spread", "consistency")}
        for pool in document["pools"]
        for key in keys
        if (cell := pool["columns"].get(key))
    ]


def table_of_wordings(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table of (b), as GitHub Markdown."""
    shown = ["| trained on | model | mean | worst wording | spread (IQR) | consistency |", "|---|---|---:|---:|---:|---:|"]
    for line in lines:
        numbers = [
            "–" if line[name] is None else f"{line[name]:{form}}"
            for name, form in (("mean", ".1f"), ("worst", ".1f"), ("spread", ".1f"), ("consistency", ".1f"))
        ]
        shown.append(f"| {line['variant']} | {line['model']} | {' | '.join(numbers)} |")
    return "\n".join(shown) + "\n"


def figures_of(variant: str, document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One record for each pool of tasks: base and tuned mean, their difference with its interval, the spread over wordings."""
    tuned = document["columns"][-1]["key"]
    base = next(column["against"] for column in document["columns"] if column["key"] == tuned)
    lines = []
    for pool in document["pools"]:
        if tuned not in pool["differences"]:
            continue
        difference = pool["differences"][tuned]
        lines.append(
            {
                "variant": variant,
                "pool": f"{'held_out' if pool['held_out'] else 'trained_on'}_{pool['kind']}",
                "tasks": pool["tasks"],
                "base": round(pool["columns"][base]["mean"], 2),
                "tuned": round(pool["columns"][tuned]["mean"], 2),
                "difference": difference["mean"],
                "interval": [round(value, 2) for value in difference["interval"]],
                "p": difference["p"],
                "spread": pool["columns"][tuned]["spread"],
            }
        )
    return lines


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures as GitHub Markdown."""
    lines = [
        "| run | tasks | base | tuned | tuned − base (95% interval) | p | spread over wordings |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row["interval"]
        where = row["pool"].replace("_", " ")
        spread = "–" if row["spread"] is None else f"{row['spread']:.1f}"
        lines.append(
            f"| {row['variant']} | {where} ({row['tasks']}) | {row['base']:.1f} | {row['tuned']:.1f} |"
            f" {row['difference']:+.1f} ({low:+.1f} to {high:+.1f}) | {row['p']:.3f} | {spread} |"
        )
    return "\n".join(lines) + "\n"


def picture_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The differences with their intervals, one line each, as SVG text."""
    import io

    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.9 + 0.34 * len(rows)), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for line, row in enumerate(rows):
        colour = "#c05621" if row["pool"].startswith("held_out") else "#0f609b"
        axes.plot(row["interval"], [line, line], color=colour, linewidth=1.6)
        axes.plot([row["difference"]], [line], "o", color=colour, markersize=5)
    axes.axvline(0, color="#7b8794", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row['variant']}: {row['pool'].replace('_', ' ')}" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("tuned − base, points, 95% interval")
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


if __name__ == "__main__":
    claim_stdout()
    main()
