"""Scoring a run on other tasks than its own: its report, its score and its verdict stay what they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from apprentice import pipeline
from apprentice.data.encoding.prompt_contract import layout_of, make_contract
from apprentice.errors import RunError
from apprentice.pipeline import evaluate as evaluation
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import load_recipe
from apprentice.run.folder import Run, open_run
from apprentice.storage import Folder
from apprentice.tasks.definition import definition_of
from apprentice.tasks.registry import load_task, select_tasks
from tests.data.small import write_tasks
from tests.support.recipes import tiny_recipe


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Run:
    """As training leaves one."""
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model))
    opened = open_run(recipe)
    shutil.copytree(tiny_model, opened.model.local)
    layout = layout_of(recipe, Tokenizer(opened.model.local))
    make_contract(recipe, layout, opened.model.local, run=recipe.name).write(opened.model.local)
    return opened


def test_other_tasks_have_a_report_of_their_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[tuple[Folder, list[Folder]]] = []

    def evaluated(recipe: Any, run: Any, subjects: Any, place: Folder, within: Any, others: Any, *rest: Any) -> dict[str, Any]:
        known.append((place, list(others)))
        columns = [{"subject": "tuned", "key": "tuned"}]
        summary = {"score": 10.0 * len(known)}
        return {"summary": summary, "gate": {"passed": len(known) == 1}, "created": "now", "columns": columns, "tasks": []}

    monkeypatch.setattr(evaluation, "ray_session", lambda: pytest.MonkeyPatch.context())
    monkeypatch.setattr(evaluation, "_score_subjects", evaluated)
    show = {"progress": lambda *_: None}
    pipeline.evaluate_target(str(run.folder), [], options=pipeline.EvaluationOptions(), **show)
    pipeline.evaluate_target(str(run.folder), [], options=pipeline.EvaluationOptions(tasks=("sst2", "ag_news")), **show)
    assert known == [(run.report, []), (run.report / "tasks-sst2-ag_news", [run.report])]
    assert run.status()["score"] == 10.0
    assert (run.model / "gate.json").read_json()["passed"] is True


def test_a_run_is_scored_by_the_definitions_that_it_was_made_with(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, though the task's file is another one now; the recipe that names that file is refused."""
    write_tasks(tmp_path)
    file = tiny_recipe(tmp_path, tiny_model, data__tasks=["./sums.yaml", "./stories.yaml"], data__hold_out=["tone"])
    run = open_run(load_recipe(file))
    scored: list[dict[str, str]] = []

    def evaluated(recipe: Any, **rest: Any) -> Any:
        tasks, _ = select_tasks(recipe.data.entries, recipe.data.hold_out, tmp_path, to_train=False, find=run.tasks().find)
        scored.append({task.name: definition_of(task) for task in tasks})
        return {}, run.report

    monkeypatch.setattr(evaluation, "evaluate_run", evaluated)
    show = {"progress": lambda *_: None}
    pipeline.evaluate_target(str(file), [], options=pipeline.EvaluationOptions(), **show)
    changed = yaml.safe_load((tmp_path / "sums.yaml").read_text()) | {"answer": "{{ a - b }}"}
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(changed))
    load_task.cache_clear()
    pipeline.evaluate_target("tiny", [], options=pipeline.EvaluationOptions(storage=str(tmp_path / "runs")), **show)
    pipeline.evaluate_target(
        "tiny", [], options=pipeline.EvaluationOptions(storage=str(tmp_path / "runs"), tasks=("sums",)), **show
    )
    assert scored == [scored[0], scored[0], {"sums": scored[0]["sums"]}]
    with pytest.raises(RunError, match=r"task 'sums' changed since run 'tiny' was made; .*: apprentice evaluate /.*/runs/tiny\.$"):
        pipeline.evaluate_target(str(file), [], options=pipeline.EvaluationOptions(), **show)


def test_the_recipe_of_a_bare_model_is_not_written_into_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be read-only; paths are relative to it all the same."""
    monkeypatch.chdir(tmp_path)
    files: list[Path] = []

    def load(path: Any, overrides: Any) -> Any:
        files.extend(tmp_path.iterdir())
        return load_recipe(path, overrides)

    monkeypatch.setattr(evaluation, "load_recipe", load)
    options = pipeline.EvaluationOptions(tasks=("./sums.yaml", "sst2"), storage="runs")
    recipe = evaluation._bare_recipe("./model", ["evaluation.max_examples=7"], options)
    assert files == []
    assert (recipe.model.base, recipe.storage) == (str(tmp_path / "model"), str(tmp_path / "runs"))
    assert recipe.data.tasks == (str(tmp_path / "sums.yaml"), "sst2")
    assert recipe.data.hold_out == ("./sums.yaml", "sst2")
    assert recipe.evaluation.max_examples == 7
