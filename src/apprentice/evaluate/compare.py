"""Several evaluations' tables of predictions to one, in which each run is a subject and the first is what the others meet. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from apprentice.errors import EvaluationError
from apprentice.evaluate.majority import NAME as MAJORITY
from apprentice.evaluate.predictions import PREDICTION, facts_of, table_of, with_facts


def joined(tables: Mapping[str, pa.Table]) -> pa.Table:
    """Run name → its table becomes one table of the tasks that all have; of each run the last subject is taken.

    Pairs are made of the questions that two runs share. Raises `EvaluationError` for fewer than two runs, or no task in common.
    """
    if len(tables) < 2:
        raise EvaluationError("comparing needs at least two runs of different names.")
    facts = {name: facts_of(table) for name, table in tables.items()}
    shared = set.intersection(*(set(found["tasks"]) for found in facts.values()))
    if not shared:
        raise EvaluationError(f"the runs {', '.join(tables)} have no task in common, so there is nothing to compare.")
    records: list[dict[str, Any]] = []
    subjects = []
    for number, (name, table) in enumerate(tables.items()):
        last = facts[name]["subjects"][-1]
        subjects.append({**last, "name": name})
        kept = [record for record in table.to_pylist() if record["task"] in shared]
        # A run's log-ratio is to its own base, which is not the run that it meets here.
        records += [{**record, "subject": name, "log_ratio": None} for record in kept if record["subject"] == last["name"]]
        records += [record for record in kept if record["subject"] == MAJORITY and not number]
    first = next(iter(facts.values()))
    # A task that any of the runs trained on is not held out for all.
    tasks = {
        task: {**about, "held_out": all(found["tasks"][task]["held_out"] for found in facts.values())}
        for task, about in first["tasks"].items()
        if task in shared
    }
    judges = {found["settings"].get("judge") for found in facts.values()}
    whole = first | {
        "name": " and ".join(tables),
        "subjects": subjects,
        "tasks": tasks,
        "settings": first["settings"] | {"gate": None, "judge": judges.pop() if len(judges) == 1 else None},
        "story": {"history": [], "ledger": None},
        "not_scored": [
            {"task": task, "reason": f"not in {name}"}
            for task in sorted(set().union(*(found["tasks"] for found in facts.values())) - shared)
            for name in facts
            if task not in facts[name]["tasks"]
        ],
    }
    return with_facts(table_of(records, PREDICTION), whole)
