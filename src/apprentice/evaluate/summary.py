"""The table of predictions to the numbers of a report: scores, intervals, wordings, differences, pools.

Pure: the same table gives the same report, without any model. Knows nothing of how the numbers are shown.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from apprentice.evaluate.intervals import CONFIDENCE, RESAMPLES, RowSums, bootstrap, interval, verdict
from apprentice.evaluate.majority import NAME as MAJORITY
from apprentice.evaluate.metrics import METRICS, Floats
from apprentice.evaluate.predictions import facts_of
from apprentice.evaluate.robustness import robustness

Record = Mapping[str, Any]
SAMPLES = 2  # questions per task that the report shows
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
    pools = [pool for held_out, kind in POOLS if (pool := _pool(held_out, kind, tasks, draws, columns))]
    report = facts | {"confidence": CONFIDENCE, "resamples": resamples, "columns": columns, "tasks": tasks, "pools": pools}
    headline = [sentence for pool in pools for sentence in _sentences(pool, columns)]
    return report | {"headline": headline, "summary": _summary(tasks, pools, columns)}


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


@dataclass(frozen=True)
class _Scored:
    """The questions of one column of one task that were asked, with each metric's statistics of every reply."""

    records: Sequence[Record]
    statistics: Mapping[str, Floats]  # metric → (questions, width)

    @classmethod
    def of(cls, records: Sequence[Record], metrics: Sequence[str]) -> _Scored:
        asked = [record for record in records if not record["dropped"]]
        pairs = [(record["prediction"], record["references"]) for record in asked]
        return cls(asked, {name: np.array([METRICS[name].statistics(*pair) for pair in pairs]) for name in metrics})

    def by_row(self, metric: str, template: str | None = None) -> RowSums:
        """Statistics summed over the wordings of each row, or over one wording alone."""
        chosen = [number for number, record in enumerate(self.records) if template in (None, record["template"])]
        return RowSums.of([self.records[number]["row"] for number in chosen], self.statistics[metric][chosen])


def _task(
    task: str,
    about: Mapping[str, Any],
    met: Mapping[str, list[Record]],
    columns: Sequence[Mapping[str, Any]],
    key: str,
    resamples: int,
) -> tuple[dict[str, Any], dict[str, Floats]]:
    """A task's entry, and the bootstrap draws of its columns (`a`) and of its differences (`a - b`)."""
    main = about["metrics"][0]
    metric = METRICS[main]
    scored = {column: _Scored.of(records, about["metrics"]) for column, records in met.items()}
    sums = {column: found.by_row(main) for column, found in scored.items() if found.records}
    draws: dict[str, Floats] = {}
    for name, found in sums.items():
        draws |= bootstrap({name: found}, metric, key, resamples)
    differences = {}
    for column in columns:
        ours, theirs = column["key"], column["against"]
        if ours not in sums or theirs not in sums:
            continue
        shared = np.intersect1d(sums[ours].rows, sums[theirs].rows)
        if not len(shared):
            continue
        pair = {side: sums[side].only(shared) for side in (ours, theirs)}
        drawn = bootstrap(pair, metric, key, resamples)
        draws[f"{ours} - {theirs}"] = drawn[ours] - drawn[theirs]
        mean = pair[ours].score(metric) - pair[theirs].score(metric)
        differences[ours] = {"against": theirs, "rows": len(shared), **_with_interval(mean, draws[f"{ours} - {theirs}"])}
    cells = {name: _counts(records) for name, records in met.items()}
    for name in sums:
        cells[name] |= _scores(scored[name], about["metrics"], draws[name])
    entry = {"task": task, **about, "metric": main, "columns": cells, "differences": differences}
    return entry | {"samples": _samples(met, columns)}, draws


def _with_interval(mean: float, draws: Floats) -> dict[str, Any]:
    low, high = interval(draws)
    return {"mean": mean, "interval": [low, high], "verdict": verdict(low, high)}


def _counts(records: Sequence[Record]) -> dict[str, Any]:
    return {
        "questions": len(records),
        "truncated": dict(Counter(record["truncated"] for record in records if record["truncated"])),
        "dropped": dict(Counter(record["dropped"] for record in records if record["dropped"])),
        "score": None,  # where every question was dropped
    }


def _scores(scored: _Scored, metrics: Sequence[str], draws: Floats) -> dict[str, Any]:
    main = METRICS[metrics[0]]
    asked = Counter(record["template"] for record in scored.records)
    wordings = {name: scored.by_row(metrics[0], name).score(main) for name in sorted(asked)}
    spread = robustness(wordings)
    scores = {name: scored.by_row(name).score(METRICS[name]) for name in metrics}
    return {
        "score": scores[metrics[0]],
        "interval": list(interval(draws)),
        "metrics": scores,
        "rows": len({record["row"] for record in scored.records}),
        "wordings": {name: {"score": score, "questions": asked[name]} for name, score in wordings.items()},
        "worst": wordings[spread.worst],
        "worst_wording": spread.worst,
        "spread": spread.spread,
        "exemplars": float(np.mean([len(record["exemplars"] or []) for record in scored.records])),
        "prompt_tokens": float(np.mean([record["prompt_tokens"] or 0 for record in scored.records])),
    }


def _samples(met: Mapping[str, Sequence[Record]], columns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first questions of the task, with every subject's reply."""
    order = [column["key"] for column in columns if column["key"] in met]
    said: dict[tuple[int, str], dict[str, Any]] = {}
    for key in order:
        for record in met[key]:
            if record["dropped"]:
                continue
            place = said.setdefault(
                (record["row"], record["template"]), {"prompt": None, "target": record["target"], "replies": {}}
            )
            place["replies"][key] = record["prediction"]
            place["prompt"] = place["prompt"] or record["prompt"]
    rows = [(place, {"row": place[0], "template": place[1], **sample}) for place, sample in sorted(said.items())]
    different = {place[0]: sample for place, sample in reversed(rows)}  # one question per row
    return [sample for _, sample in sorted(different.items())][:SAMPLES]


def _pool(
    held_out: bool,
    kind: str,
    tasks: Sequence[Mapping[str, Any]],
    draws: Mapping[str, Mapping[str, Floats]],
    columns: Sequence[Mapping[str, Any]],
) -> dict[str, Any] | None:
    """Means over the tasks of one kind, each task counting the same; rows are resampled within their task. None without tasks."""
    members = [task for task in tasks if task["held_out"] is held_out and task["kind"] == kind]
    if not members:
        return None
    scores, differences = {}, {}
    for column in columns:
        key = column["key"]
        scored = [task for task in members if task["columns"].get(key, {}).get("score") is not None]
        if scored:
            mean = float(np.mean([task["columns"][key]["score"] for task in scored]))
            drawn = np.mean([draws[task["task"]][key] for task in scored], axis=0)
            scores[key] = {"mean": mean, "interval": list(interval(drawn)), "tasks": len(scored)}
        compared = [task for task in members if key in task["differences"]]
        if compared:
            mean = float(np.mean([task["differences"][key]["mean"] for task in compared]))
            drawn = np.mean([draws[task["task"]][f"{key} - {column['against']}"] for task in compared], axis=0)
            differences[key] = {"against": column["against"], "tasks": len(compared), **_with_interval(mean, drawn)}
    return {"held_out": held_out, "kind": kind, "tasks": len(members), "columns": scores, "differences": differences}


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
