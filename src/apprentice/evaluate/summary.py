"""The table of predictions to the numbers of a report: scores, intervals, wordings, differences, pools.

Pure: the same table gives the same report, without any model. Knows nothing of how the numbers are shown.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from apprentice.evaluate.cells import Scored, counts, paired, scores
from apprentice.evaluate.examples import best_and_worst, samples
from apprentice.evaluate.gate import judged
from apprentice.evaluate.intervals import CONFIDENCE, RESAMPLES, bootstrap, interval, p_value, swapped, verdict
from apprentice.evaluate.majority import NAME as MAJORITY
from apprentice.evaluate.metrics import METRICS, Floats
from apprentice.evaluate.predictions import facts_of
from apprentice.evaluate.winning import judged_by
from apprentice.models.ranking import RANKING_TITLES

Record = Mapping[str, Any]
POOLS = ((True, "ranked"), (True, "generated"), (False, "ranked"), (False, "generated"))  # (held out, kind), as shown


def summarise(table: pa.Table, *, resamples: int = RESAMPLES) -> dict[str, Any]:
    """The report: the table's facts, `columns`, `tasks`, `pools`, one `headline` per difference of a pool, and a `summary`.

    Scores are 0 to 100. The first subject is what the others are compared with, at the same number of exemplars. Held-out tasks
    come first; a task's first metric is the one that its intervals, wordings and pools use.
    """
    facts = facts_of(table)
    columns = _columns(facts)
    met: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in table.to_pylist():
        met[record["task"]][_key(record["subject"], record["shots"])].append(record)
    names = sorted(met, key=lambda name: (not facts["tasks"][name]["held_out"], facts["tasks"][name]["cluster"], name))
    tasks, draws = [], {}
    for name in names:
        entry, found = _task(name, facts["tasks"][name], met[name], columns, f"{facts['seed']} {name}", resamples)
        tasks.append(entry)
        draws[name] = found
    pools = []
    for held_out, kind in POOLS:
        members = [task for task in tasks if task["held_out"] is held_out and task["kind"] == kind]
        if members:
            pools.append({"held_out": held_out, "kind": kind, **_pool(members, draws, columns)})
    clusters = []
    for held_out, cluster in dict.fromkeys((task["held_out"], task["cluster"]) for task in tasks):
        members = [task for task in tasks if (task["held_out"], task["cluster"]) == (held_out, cluster)]
        clusters.append({"held_out": held_out, "cluster": cluster, **_pool(members, draws, columns)})
    rank_by = facts["settings"].get("rank_by", "sum")
    used = sorted({name for task in tasks for name in task["metrics"]})
    report = facts | {
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
        held_out_of = {name: about["held_out"] for name, about in facts["tasks"].items()}
        report["judged"] = judged_by(facts["settings"]["judge"], records, columns, held_out_of, resamples)
    headline = [sentence for pool in pools for sentence in _sentences(pool, columns)]
    report |= {"headline": headline, "summary": _summary(tasks, pools, columns)}
    return report | {"gate": judged(report)}


def _unscored(met: Mapping[str, Mapping[str, Sequence[Record]]]) -> list[dict[str, Any]]:
    """The questions that were asked and have no answer, with the reason."""
    return [
        {name: record[name] for name in ("subject", "task", "row", "template", "shots", "perturbation")}
        | {"reason": record["unscored"]}
        for columns in met.values()
        for records in columns.values()
        for record in records
        if record["unscored"]
    ]


def _key(subject: str, shots: int) -> str:
    return f"{subject}@{shots}"


def _columns(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is scored, in the order shown; `against` is the column that a column is compared with."""
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
    """A task's entry, and the bootstrap draws of its columns (`a`), of its differences (`a - b`) and of their tests (`a ~ b`)."""
    main = about["metrics"][0]
    metric = METRICS[main]
    scored = {column: Scored.of(records, about["metrics"]) for column, records in met.items()}
    sums = {column: found.by_row(main) for column, found in scored.items() if found.records}
    draws: dict[str, Floats] = {}
    for name, found in sums.items():
        draws |= bootstrap({name: found}, metric, key, resamples)
    differences = {}
    for column in columns:
        ours, theirs = column["key"], column["against"]
        if ours not in sums or theirs not in sums:
            continue
        pair = paired(scored[ours], scored[theirs], main)
        if pair is None:
            continue
        drawn = bootstrap({ours: pair[0], theirs: pair[1]}, metric, key, resamples)
        draws[f"{ours} - {theirs}"] = drawn[ours] - drawn[theirs]
        draws[f"{ours} ~ {theirs}"] = swapped(*pair, metric, key, resamples)
        mean = pair[0].score(metric) - pair[1].score(metric)
        test = p_value(mean, draws[f"{ours} ~ {theirs}"])
        differences[ours] = {
            "against": theirs,
            "rows": len(pair[0].rows),
            **_with_interval(mean, draws[f"{ours} - {theirs}"], test),
        }
    cells = {name: counts(records) for name, records in met.items()}
    for name in sums:
        cells[name] |= scores(scored[name], met[name], about["metrics"], draws[name])
    entry = {"task": task, **about, "metric": main, "columns": cells, "differences": differences}
    return entry | {"samples": samples(met, columns), "extremes": best_and_worst(met, columns)}, draws


def _with_interval(mean: float, draws: Floats, p: float) -> dict[str, Any]:
    low, high = interval(draws)
    return {"mean": mean, "interval": [low, high], "p": p, "verdict": verdict(low, high, p)}


def _pool(
    members: Sequence[Mapping[str, Any]], draws: Mapping[str, Mapping[str, Floats]], columns: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Means over the tasks `members`, each task counting the same; rows are resampled within their task."""
    means, differences = {}, {}
    for column in columns:
        key = column["key"]
        scored = [task for task in members if task["columns"].get(key, {}).get("score") is not None]
        if scored:
            mean = float(np.mean([task["columns"][key]["score"] for task in scored]))
            drawn = np.mean([draws[task["task"]][key] for task in scored], axis=0)
            means[key] = {"mean": mean, "interval": list(interval(drawn)), "tasks": len(scored)} | {
                name: _mean_of(scored, key, name) for name in ("worst", "spread", "changed", "consistency")
            }
        compared = [task for task in members if key in task["differences"]]
        if compared:
            mean = float(np.mean([task["differences"][key]["mean"] for task in compared]))
            drawn, test = (
                np.mean([draws[task["task"]][f"{key} {sign} {column['against']}"] for task in compared], axis=0) for sign in "-~"
            )
            differences[key] = {
                "against": column["against"],
                "tasks": len(compared),
                **_with_interval(mean, drawn, p_value(mean, test)),
            }
    return {"tasks": len(members), "columns": means, "differences": differences}


def _mean_of(tasks: Sequence[Mapping[str, Any]], key: str, name: str) -> float | None:
    """The mean of one number of a column's cells over the tasks that have it."""
    values = [task["columns"][key][name] for task in tasks if task["columns"][key][name] is not None]
    return float(np.mean(values)) if values else None


def _sentences(pool: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence per comparison: who scores what, the difference, its interval."""
    titles = {column["key"]: column["title"] for column in columns}
    where = f"{'held-out' if pool['held_out'] else 'trained-on'} {pool['kind']}"
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
    """`score`: the last subject's mean over tasks at its fewest exemplars; `sentence`: differences by pool, or scores by pool."""
    chosen = next(column for column in columns if column["subject"] == columns[-1]["subject"])
    scores = [cell["score"] for task in tasks if (cell := task["columns"].get(chosen["key"])) and cell["score"] is not None]
    parts = []
    for pool in pools:
        where = f"{'held-out' if pool['held_out'] else 'trained-on'} {pool['kind']}"
        if found := pool["differences"].get(chosen["key"]):
            parts.append(f"{where} {found['mean']:+.1f} ({found['interval'][0]:+.1f} to {found['interval'][1]:+.1f})")
        elif found := pool["columns"].get(chosen["key"]):
            parts.append(f"{where} {found['mean']:.1f}")
    titles = {column["key"]: column["title"] for column in columns}
    against = f" against {titles[chosen['against']]}, points with 95% interval" if chosen["against"] else ""
    return {"score": float(np.mean(scores)) if scores else None, "sentence": f"{chosen['title']}{against}: {', '.join(parts)}"}
