"""Summary of a table of predictions as a report: scores, intervals, wordings, differences, pools.

    column   a subject at one number of exemplars, such as `model@0`; the baseline `majority@0` is the first
    task     scores of each column, and differences of columns over the rows that both answered
    pool     means over the tasks of one exposure (held out, scored only, trained on) and kind (ranked, generated)

Pure: the same table gives the same report, without any model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from apprentice.evaluate.report.examples import best_and_worst_questions, samples
from apprentice.evaluate.report.predictions import metadata_of
from apprentice.evaluate.report.quality_gate import judged
from apprentice.evaluate.scoring.majority_baseline import NAME as MAJORITY
from apprentice.evaluate.stats.bootstrap import (
    CONFIDENCE,
    RESAMPLES,
    adjust_p_values,
    difference_interval,
    mean_interval,
    p_value,
    permuted_differences,
    verdict,
)
from apprentice.evaluate.stats.metrics import METRICS, Floats
from apprentice.evaluate.stats.task_scores import AnswerStatistics, counts, paired, scores
from apprentice.evaluate.stats.win_rate import compute_win_rates
from apprentice.inference.choices.choice_ranking import RANKING_TITLES
from apprentice.tasks.exposure import EXPOSURES, exposure_in

Record = Mapping[str, Any]
VERSION = 2  # of report.json: 1 had no `exposure`, `p_adjusted` and `shared`, bootstrap intervals throughout, and `divergence`
POOLS = [(exposure, kind) for exposure in EXPOSURES for kind in ("ranked", "generated")]  # in the order of the report
LEAST_SHARED_ROWS = 20  # compared runs with fewer rows in common in a pool have no headline about it


def summarise(table: pa.Table, *, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Builds the report (`Report`): the table's facts, columns, tasks, pools, clusters, headlines, summary, quality gate.

    Scores are 0 to 100. The other subjects are compared with the first, at the same number of exemplars. Held-out tasks come first.
    Intervals, wordings and pools use the first metric of each task. `resamples` is the number of bootstrap draws and permutations.
    """
    facts = metadata_of(table)
    facts["tasks"] = {name: about | exposure_in(about) for name, about in facts["tasks"].items()}
    columns = _columns(facts)
    met: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in table.to_pylist():
        met[record["task"]][_key(record["subject"], record["shots"])].append(record)
    names = sorted(met, key=lambda name: (EXPOSURES.index(facts["tasks"][name]["exposure"]), facts["tasks"][name]["cluster"], name))
    tasks, draws = [], {}
    for name in names:
        entry, found = _task(name, facts["tasks"][name], met[name], columns, f"{facts['seed']} {name}", resamples)
        tasks.append(entry)
        draws[name] = found
    pools = []
    for exposure, kind in POOLS:
        members = [task for task in tasks if (task["exposure"], task["kind"]) == (exposure, kind)]
        if members:
            pools.append(_exposed(exposure) | {"kind": kind, **_pool(members, draws, columns)})
    clusters = []
    for exposure, cluster in dict.fromkeys((task["exposure"], task["cluster"]) for task in tasks):
        members = [task for task in tasks if (task["exposure"], task["cluster"]) == (exposure, cluster)]
        clusters.append(_exposed(exposure) | {"cluster": cluster, **_pool(members, draws, columns)})
    for lines in (tasks, pools, clusters):
        _mark([found for line in lines for found in line["differences"].values()])
    rank_by = facts["settings"].get("rank_by", "sum")
    used = sorted({name for task in tasks for name in task["metrics"]})
    report = facts | {
        "version": VERSION,
        "confidence": CONFIDENCE,
        "resamples": resamples,
        "ranking": {"by": rank_by, "meaning": RANKING_TITLES[rank_by]},
        "signatures": {name: signature() for name in used if (signature := METRICS[name].signature) is not None},
        "columns": columns,
        "tasks": tasks,
        "pools": pools,
        "clusters": clusters,
        "unscored": _unscored(met),
    }
    if facts["settings"].get("judge"):
        records = [record for columns_met in met.values() for found in columns_met.values() for record in found]
        exposures = {name: about["exposure"] for name, about in facts["tasks"].items()}
        report["judged"] = compute_win_rates(facts["settings"]["judge"], records, columns, exposures, resamples)
        _mark(report["judged"]["lines"], middle=50.0)
    spoken = [pool for pool in pools if not (facts.get("shared") and _rows_of(pool, tasks) < LEAST_SHARED_ROWS)]
    headline = [sentence for pool in spoken for sentence in _sentences(pool, columns)]
    report |= {"headline": headline, "summary": _summary(tasks, spoken, columns)}
    return report | {"gate": judged(report)}


def _unscored(met: Mapping[str, Mapping[str, Sequence[Record]]]) -> list[dict[str, Any]]:
    """Questions that were asked and have no answer, each with its `reason`."""
    return [
        {name: record[name] for name in ("subject", "task", "row", "template", "shots", "perturbation")}
        | {"reason": record["unscored"]}
        for columns in met.values()
        for records in columns.values()
        for record in records
        if record["unscored"]
    ]


def _exposed(exposure: str) -> dict[str, Any]:
    return {"held_out": exposure == "held_out", "exposure": exposure}


def _rows_of(pool: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]) -> int:
    """Fewest rows that a difference in `pool` is computed from; 0 without differences."""
    members = [task for task in tasks if (task["exposure"], task["kind"]) == (pool["exposure"], pool["kind"])]
    keys = [key for task in members for key in task["differences"]]
    return min((sum(task["differences"][key]["rows"] for task in members if key in task["differences"]) for key in keys), default=0)


def _mark(found: Sequence[dict[str, Any]], middle: float = 0.0) -> None:
    """Adds `p_adjusted` and `verdict` to all comparisons of one table; `middle` is the value of no difference."""
    for entry, p in zip(found, adjust_p_values([entry["p"] for entry in found]), strict=True):
        low, high = entry["interval"]
        entry |= {"p_adjusted": p, "verdict": verdict(low - middle, high - middle, p)}


def _key(subject: str, shots: int) -> str:
    return f"{subject}@{shots}"


def _columns(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Columns in the order of the report; `against` is the key of the column that a column is compared with, or None."""
    first = facts["subjects"][0]
    columns = [{"key": _key(MAJORITY, 0), "subject": MAJORITY, "shots": 0, "title": "majority", "against": None}]
    for subject in facts["subjects"]:
        for shots in subject["shots"]:
            compared = subject is not first and shots in first["shots"]
            columns.append(
                {
                    "key": _key(subject["name"], shots),
                    "subject": subject["name"],
                    "shots": shots,
                    "title": subject["name"] + (f" {shots}-shot" if shots else ""),
                    "against": _key(first["name"], shots) if compared else None,
                }
            )
    return columns


def _task(
    task: str,
    about: Mapping[str, Any],
    met: Mapping[str, list[Record]],
    columns: Sequence[Mapping[str, Any]],
    key: str,
    resamples: int,
) -> tuple[dict[str, Any], dict[str, Floats]]:
    """Entry of a task in the report, and the permutation draws of its differences by column."""
    main = about["metrics"][0]
    metric = METRICS[main]
    scored = {column: AnswerStatistics.of(records, about["metrics"]) for column, records in met.items()}
    draws: dict[str, Floats] = {}
    differences = {}
    for column in columns:
        ours, theirs = column["key"], column["against"]
        if ours not in scored or theirs not in scored:
            continue
        pair = paired(scored[ours], scored[theirs], main)
        if pair is None:
            continue
        draws[ours] = permuted_differences(*pair, metric, key, resamples)
        mean = pair[0].score(metric) - pair[1].score(metric)
        differences[ours] = {
            "against": theirs,
            "rows": len(pair[0].rows),
            "mean": mean,
            "interval": list(difference_interval(*pair, metric, key, resamples)),
            "p": p_value(mean, draws[ours]),
        }
    cells = {name: counts(records) for name, records in met.items()}
    for name, found in scored.items():
        if found.records:
            cells[name] |= scores(found, met[name], about["metrics"], key, resamples)
    entry = {"task": task, **about, "metric": main, "columns": cells, "differences": differences}
    return entry | {"samples": samples(met, columns), "extremes": best_and_worst_questions(met, columns)}, draws


def _pool(
    members: Sequence[Mapping[str, Any]], draws: Mapping[str, Mapping[str, Floats]], columns: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Means and differences over the tasks `members`, all weighted the same; rows are permuted within their task."""
    means, differences = {}, {}
    for column in columns:
        key = column["key"]
        scored = [task for task in members if task["columns"].get(key, {}).get("score") is not None]
        if scored:
            found = [(task["columns"][key]["score"], *task["columns"][key]["interval"]) for task in scored]
            means[key] = {
                "mean": float(np.mean([score for score, *_ in found])),
                "interval": list(mean_interval(found)),
                "tasks": len(scored),
            } | {name: _mean_of(scored, key, name) for name in ("worst", "spread", "changed", "consistency")}
        compared = [task for task in members if key in task["differences"]]
        if compared:
            mean = float(np.mean([task["differences"][key]["mean"] for task in compared]))
            test = np.mean([draws[task["task"]][key] for task in compared], axis=0)
            differences[key] = {
                "against": column["against"],
                "tasks": len(compared),
                "mean": mean,
                "interval": list(gain_interval(compared, key)),
                "p": p_value(mean, test),
            }
    return {"tasks": len(members), "columns": means, "differences": differences}


def gain_interval(tasks: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float]:
    """95% interval of the difference of the column `key`, averaged over `tasks`."""
    found = [task["differences"][key] for task in tasks]
    return mean_interval([(entry["mean"], *entry["interval"]) for entry in found])


def _mean_of(tasks: Sequence[Mapping[str, Any]], key: str, name: str) -> float | None:
    """Mean of the cells' value `name` in the column `key`, over the tasks that have it; None if none has."""
    values = [task["columns"][key][name] for task in tasks if task["columns"][key][name] is not None]
    return float(np.mean(values)) if values else None


def _sentences(pool: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Headlines of a pool: one sentence per difference, with its verdict and interval."""
    titles = {column["key"]: column["title"] for column in columns}
    where = f"{pool['exposure'].replace('_', '-')} {pool['kind']}"
    sentences = []
    for key, found in pool["differences"].items():
        low, high = found["interval"]
        tasks = f"On {found['tasks']} {where} task{'s' if found['tasks'] > 1 else ''}"
        relation = {"better": "better than", "worse": "worse than", "unclear": "not clearly different from"}[found["verdict"]]
        sentences.append(
            f"{tasks} {titles[key]} is {relation} {titles[found['against']]}:"
            f" {found['mean']:+.1f} points (95% interval {low:+.1f} to {high:+.1f})."
        )
    return sentences


def _summary(
    tasks: Sequence[Mapping[str, Any]], pools: Sequence[Mapping[str, Any]], columns: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Summary of the last subject at its fewest exemplars: `score`, its mean over tasks, and a `sentence` about the pools."""
    chosen = next(column for column in columns if column["subject"] == columns[-1]["subject"])
    scores = [cell["score"] for task in tasks if (cell := task["columns"].get(chosen["key"])) and cell["score"] is not None]
    parts = []
    for pool in pools:
        where = f"{pool['exposure'].replace('_', '-')} {pool['kind']}"
        if found := pool["differences"].get(chosen["key"]):
            parts.append(f"{where} {found['mean']:+.1f} ({found['interval'][0]:+.1f} to {found['interval'][1]:+.1f})")
        elif found := pool["columns"].get(chosen["key"]):
            parts.append(f"{where} {found['mean']:.1f}")
    titles = {column["key"]: column["title"] for column in columns}
    against = f" against {titles[chosen['against']]}, points with 95% interval" if chosen["against"] else ""
    told = ", ".join(parts) or "too few rows to say"
    return {"score": float(np.mean(scores)) if scores else None, "sentence": f"{chosen['title']}{against}: {told}"}
