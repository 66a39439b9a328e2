"""Example questions of a report: a few of each task, and those where the last subject did best and worst. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
SAMPLES = 2  # questions per task
EXTREMES = 10  # best and worst of the whole report
RecordsByColumn = Mapping[str, Sequence[Record]]


def samples(met: RecordsByColumn, columns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """First `SAMPLES` questions of a task, one per row, with the reply of every column."""
    rows = [(place, {"row": place[0], "template": place[1], **sample}) for place, sample in sorted(_said(met, columns).items())]
    different = {place[0]: sample for place, sample in reversed(rows)}  # one question per row
    return [sample for _, sample in sorted(different.items())][:SAMPLES]


def best_and_worst_questions(met: RecordsByColumn, columns: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Best and worst questions of a task, by the last subject's score, then by its gain over the subject it is compared with.

    At most `EXTREMES` of each, one per row; `chosen` selects from those of all tasks.
    """
    last = columns[-1]
    first = next(column for column in columns if column["subject"] == last["subject"])
    ours, theirs = first["key"], first["against"]
    if ours not in met:
        return {"best": [], "worst": []}
    before = {
        (r["row"], r["template"]): r["score"] for r in met.get(theirs, ()) if r["score"] is not None and not r["perturbation"]
    }
    said = _said(met, columns)
    found: dict[int, dict[str, Any]] = {}
    for record in met[ours]:
        if record["score"] is None or record["perturbation"]:
            continue
        place = record["row"], record["template"]
        gain = record["score"] - before[place] if place in before else None
        example = {"task": record["task"], "row": place[0], "template": place[1], **said[place]}
        found.setdefault(place[0], example | {"score": record["score"], "gain": gain})
    ordered = sorted(found.values(), key=_rank)
    return {"best": ordered[::-1][:EXTREMES], "worst": ordered[:EXTREMES]}


def chosen(tasks: Sequence[Mapping[str, Any]], which: str) -> list[dict[str, Any]]:
    """Selects `EXTREMES` questions from all tasks, one of each task in turn, so that no task fills the list."""
    lists = [list(task["extremes"][which]) for task in tasks]
    turns = [examples[turn] for turn in range(EXTREMES) for examples in lists if turn < len(examples)]
    better = -1 if which == "best" else 1
    return sorted(turns[:EXTREMES], key=lambda example: tuple(better * value for value in _rank(example)))


def _rank(example: Mapping[str, Any]) -> tuple[float, float]:
    return example["score"], example["gain"] or 0.0


def _said(met: RecordsByColumn, columns: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], dict[str, Any]]:
    """(row, template) → prompt, target, and the reply of each column."""
    said: dict[tuple[int, str], dict[str, Any]] = {}
    for key in (column["key"] for column in columns if column["key"] in met):
        for record in met[key]:
            if record["prediction"] is None or record["perturbation"]:
                continue
            place = said.setdefault(
                (record["row"], record["template"]), {"prompt": None, "target": record["target"], "replies": {}}
            )
            place["replies"][key] = record["prediction"]
            place["prompt"] = place["prompt"] or record["prompt"]
    return said
