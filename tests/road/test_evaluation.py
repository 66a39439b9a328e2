"""Scoring a run on other tasks than its own: its report, its score and its verdict stay what they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from apprentice import road
from apprentice.artifacts import Run, open_run
from apprentice.data.contract import layout_of, make_contract
from apprentice.recipe import load_recipe
from apprentice.road import evaluation
from apprentice.storage import Folder
from apprentice.tokenizer import Tokenizer
from tests.recipes import tiny_recipe


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Run:
    """As training leaves one."""
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model))
    made = open_run(recipe)
    shutil.copytree(tiny_model, made.model.local)
    layout = layout_of(recipe, Tokenizer(made.model.local))
    make_contract(recipe, layout, made.model.local, run=recipe.name).write(made.model.local)
    return made


def test_other_tasks_have_a_report_of_their_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[tuple[Folder, list[Folder]]] = []

    def evaluated(recipe: Any, run: Any, subjects: Any, place: Folder, within: Any, others: Any, *rest: Any) -> dict[str, Any]:
        known.append((place, list(others)))
        return {"summary": {"score": 10.0 * len(known)}, "gate": {"passed": len(known) == 1}, "created": "now"}

    monkeypatch.setattr(evaluation, "ray_session", lambda: pytest.MonkeyPatch.context())
    monkeypatch.setattr(evaluation, "_evaluated", evaluated)
    show = {"progress": lambda *_: None}
    road.evaluate(str(run.folder), [], wanted=road.Wanted(), **show)
    road.evaluate(str(run.folder), [], wanted=road.Wanted(tasks=("sst2", "ag_news")), **show)
    assert known == [(run.report, []), (run.report / "tasks-sst2-ag_news", [run.report])]
    assert run.status()["score"] == 10.0
    assert (run.model / "gate.json").read_json()["passed"] is True
