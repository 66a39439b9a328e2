"""Comparison of runs: joins their tables of predictions to one, in which each run is a subject and the first is the reference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from apprentice.errors import EvaluationError
from apprentice.evaluate.report.predictions import PREDICTION, make_table, metadata_of, with_metadata
from apprentice.evaluate.report.run_history import read_history
from apprentice.evaluate.scoring.majority_baseline import NAME as MAJORITY
from apprentice.tasks.exposure import exposure_in, most_seen


def join_tables(tables: Mapping[str, pa.Table]) -> pa.Table:
    """Joins `tables` (run name → predictions) to one table of their common tasks, with the last subject of each run.

    Only questions that all runs answered are kept, so that columns and differences are over the same rows. Raises
    `EvaluationError` for fewer than two runs, or no task or question in common.
    """
    if len(tables) < 2:
        raise EvaluationError("comparing needs at least two runs of different names.")
    metadata = {name: metadata_of(table) for name, table in tables.items()}
    common = set.intersection(*(set(of_run["tasks"]) for of_run in metadata.values()))
    if not common:
        raise EvaluationError(f"the runs {', '.join(tables)} have no task in common, so there is nothing to compare.")
    records: list[dict[str, Any]] = []
    subjects = []
    for number, (name, table) in enumerate(tables.items()):
        last = metadata[name]["subjects"][-1]
        subjects.append({**last, "name": name})
        kept = [record for record in table.to_pylist() if record["task"] in common]
        # The log-ratio of a run is to its own base, not to the run that it is compared with here.
        records += [{**record, "subject": name, "log_ratio": None} for record in kept if record["subject"] == last["name"]]
        records += [record for record in kept if record["subject"] == MAJORITY and not number]
    first = next(iter(metadata.values()))
    records, shared = _keep_shared_questions(records, list(tables))
    if not shared:
        raise EvaluationError(f"the runs {', '.join(tables)} answered no question in common, so there is nothing to compare.")
    # A task that any of the runs trained on does not count as held out.
    exposures = {
        task: most_seen([exposure_in(of_run["tasks"][task])["exposure"] for of_run in metadata.values()]) for task in shared
    }
    tasks = {
        task: {**about, "exposure": exposures[task], "held_out": exposures[task] == "held_out"}
        for task, about in first["tasks"].items()
        if task in shared
    }
    judges = {of_run["settings"].get("judge") for of_run in metadata.values()}
    joint = first | {
        "name": " and ".join(tables),
        "subjects": subjects,
        "tasks": tasks,
        "shared": shared,
        "settings": first["settings"] | {"gate": None, "judge": judges.pop() if len(judges) == 1 else None},
        "story": read_history(None),
        "not_scored": [
            {"task": task, "reason": f"not in {name}"}
            for task in sorted(set().union(*(of_run["tasks"] for of_run in metadata.values())) - common)
            for name in metadata
            if task not in metadata[name]["tasks"]
        ]
        + [{"task": task, "reason": "no question that all runs answered"} for task in sorted(common - set(shared))],
    }
    return with_metadata(make_table(records, PREDICTION), joint)


def _keep_shared_questions(
    records: Sequence[dict[str, Any]], runs: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Records of the questions that every column of every run answered, and for each task their number (`SharedQuestions`).

    A question is a row in one wording, with a perturbation or none; another number of exemplars is another column.
    """
    answered: dict[str, dict[tuple[str, int], set[tuple[Any, ...]]]] = defaultdict(lambda: defaultdict(set))
    for record in records:
        if record["subject"] != MAJORITY:
            of_column = answered[record["task"]][record["subject"], record["shots"]]
            if record["prediction"] is not None:
                of_column.add(_question_key(record))
    kept, shared = {}, {}
    for task, columns in answered.items():
        everywhere = set.intersection(*columns.values()) if {run for run, _ in columns} == set(runs) else set()
        plain = [question for question in everywhere if not question[2]]
        if plain:
            kept[task] = everywhere
            rows = {run: {row for (name, _), keys in columns.items() if name == run for row, *_ in keys} for run in runs}
            shared[task] = {
                "rows": len({row for row, *_ in plain}),
                "questions": len(plain),
                "of": {run: len(of_run) for run, of_run in rows.items()},
            }
    return [record for record in records if _question_key(record) in kept.get(record["task"], ())], shared


def _question_key(record: Mapping[str, Any]) -> tuple[int, str, str]:
    return record["row"], record["template"], record["perturbation"]
