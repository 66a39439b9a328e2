"""Runs side by side, question by question."""

from __future__ import annotations

import pytest

from apprentice.errors import EvaluationError
from apprentice.evaluate.compare import joined
from apprentice.evaluate.summary import summarise
from apprentice.recipe import Recipe
from tests.evaluate import tables


def test_every_run_meets_the_first(recipe: Recipe) -> None:
    one = tables.table(recipe)
    other = tables.table(recipe, tables.predictions(tuned=(7, 4, 8)))
    report = summarise(joined({"one": one, "other": other}), resamples=50)
    assert [(column["key"], column["against"]) for column in report["columns"]] == [
        ("majority@0", None),
        ("one@0", None),
        ("other@0", "one@0"),
    ]
    alpha = next(task for task in report["tasks"] if task["task"] == "alpha_rank")
    assert alpha["differences"]["other@0"]["mean"] == pytest.approx(100 / 8)


def test_runs_without_a_common_task_and_a_single_run(recipe: Recipe) -> None:
    one = tables.table(recipe)
    with pytest.raises(EvaluationError, match="at least two runs"):
        joined({"one": one})
    facts = tables.facts(recipe)
    facts["tasks"] = {"else": facts["tasks"]["alpha_rank"]}
    from apprentice.evaluate.predictions import with_facts

    with pytest.raises(EvaluationError, match="no task in common"):
        joined({"one": one, "other": with_facts(one, facts)})
