"""What `check` says of a user's own data, without Ray where it can: each fault once, with the file that the user knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from apprentice.data.corpus import Corpus, make_corpus
from apprentice.errors import DataError, RecipeError
from apprentice.preflight import check, cluster_checks, evaluation_estimate
from apprentice.preflight.evaluation_estimate import describe_evaluation
from apprentice.recipe import Recipe, load_recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder
from tests.support.recipes import tiny_recipe

TASK: dict[str, Any] = {
    "name": "sst2",  # as a task of the library
    "cluster": "own",
    "sources": [{"files": {"train": "own.csv"}}],
    "choices": ["bad", "good"],
    "label": "label",
    "metrics": ["accuracy"],
    "templates": [{"name": "ask", "instruction": "Good or bad?", "input": "{{ text }}"}],
}


def own_recipe(folder: Path, model: Path, task: dict[str, Any], *tasks: Any, **changes: Any) -> Recipe:
    (folder / "own.csv").write_text("text,label\n" + "".join(f"text {number},{number % 2}\n" for number in range(40)))
    (folder / "own.yaml").write_text(yaml.safe_dump(TASK | task))
    return load_recipe(tiny_recipe(folder, model, data__tasks=["./own.yaml", *tasks], data__hold_out=[], **changes))


def no_ray() -> AbstractContextManager[None]:
    raise AssertionError("Ray was started")


@contextmanager
def nothing() -> Iterator[None]:
    yield


def test_a_missing_column_is_told_without_ray_and_with_the_users_own_files(tmp_path: Path, tiny_model: Path) -> None:
    templates = [{"name": "ask", "instruction": "Good or bad?", "input": "{{ texts }}"}]
    recipe = own_recipe(tmp_path, tiny_model, {"templates": templates})
    findings = list(check.check(recipe, no_ray))
    assert [finding.subject for finding in findings if not finding.ok] == ["sources"]
    assert findings[-1].message == (
        f"task 'sst2' ({tmp_path}/own.yaml): template 'ask' names 'texts', but {tmp_path}/own.csv has no column 'texts'."
        " Did you mean 'text'? Its columns are text, label."
    )
    assert not (tmp_path / "runs").exists()


def test_a_missing_task_file_is_told_once(tmp_path: Path, tiny_model: Path) -> None:
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, data__tasks=["./none.yaml"], data__hold_out=[]))
    findings = list(check.check(recipe, no_ray))
    assert [(finding.subject, "none.yaml does not exist" in finding.message) for finding in findings if not finding.ok] == [
        ("tasks", True)
    ]


def test_a_good_recipe_goes_on_with_ray_and_leaves_nothing_behind(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_checks, "node_resources", lambda: [{"CPU": 8.0}])
    monkeypatch.setattr(check, "_dry_run", dry_run_here)
    recipe = own_recipe(tmp_path, tiny_model, {})
    findings = list(check.check(recipe, nothing))
    assert [(finding.subject, finding.ok) for finding in findings] == [
        (name, True) for name in ("tasks", "downloads", "model", "sources", "storage", "resources", "evaluation")
    ]
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "cache").mkdir(parents=True)
    (tmp_path / "runs" / "cache" / "kept").touch()
    assert all(finding.ok for finding in check.check(recipe, nothing))
    assert (tmp_path / "runs" / "cache" / "kept").exists()


def dry_run_here(recipe: Recipe, scratch: Run) -> list[check.Finding]:
    """Converts into the recipe's own cache, as the real one does."""
    make_corpus(recipe, scratch, parallel=False)
    assert (Folder.at(recipe.storage) / "cache").exists()
    return [check.Finding("evaluation", True, "")]


def corpus_of(recipe: Recipe, folder: Path) -> Corpus:
    return make_corpus(recipe, Run(Folder.at(folder / "run")), parallel=False)


def test_no_test_rows_are_not_ready(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_estimate, "node_resources", lambda: [{"CPU": 8.0}])
    recipe = own_recipe(tmp_path, tiny_model, {})
    with pytest.raises(DataError, match=r"^none of the recipe's tasks has test rows, so nothing can be scored; give one a test"):
        describe_evaluation(corpus_of(recipe, tmp_path / "alone"), None)
    recipe = own_recipe(tmp_path, tiny_model, {}, "quickstart")
    description = describe_evaluation(corpus_of(recipe, tmp_path / "together"), None)
    assert description.endswith("; none of sst2, without test rows")
    (tmp_path / "asked.jsonl").write_text('{"prompt": "Which herb?"}\n' * 3)
    changes = {
        "training__objective": "grpo",
        "training__grpo": {"reward": str(tiny_model)},
        "data__tasks": [{"prompts": "./asked.jsonl"}],
        "data__hold_out": [],
        "data__formats": {},
    }
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, **changes))
    assert describe_evaluation(corpus_of(recipe, tmp_path / "asked"), None).startswith(
        "nothing can be scored: the tasks have prompts"
    )


def test_warm_up_that_is_not_shorter_than_a_run_of_tokens(tmp_path: Path, tiny_model: Path) -> None:
    goal = {"training__steps": None, "training__tokens": 2000, "training__optimizer": {"warmup_steps": 50}}
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, **goal))
    with pytest.raises(RecipeError, match=r"warmup_steps 50 is not shorter than the run, which has \d+ steps; lower it"):
        check.check_index(recipe, corpus_of(recipe, tmp_path))


def test_a_changed_file_is_named_as_the_task_names_it(tmp_path: Path, tiny_model: Path) -> None:
    recipe = own_recipe(tmp_path, tiny_model, {})
    corpus_of(recipe, tmp_path)
    (tmp_path / "own.csv").write_text("text,label\nother,0\n")
    with pytest.raises(DataError, match=rf"task 'sst2': the train rows \({tmp_path}/own\.csv\) have changed since"):
        corpus_of(recipe, tmp_path)


def test_each_finding_is_told_as_soon_as_it_is_known(tmp_path: Path, tiny_model: Path) -> None:
    """`--fast` ends before Ray; without it, Ray is asked for only after the last finding that needs none was taken."""
    recipe = own_recipe(tmp_path, tiny_model, {})
    assert [finding.subject for finding in check.check(recipe, no_ray, fast=True)] == ["tasks", "downloads", "model", "sources"]
    findings = check.check(recipe, no_ray)
    assert [next(findings).subject for _ in range(4)] == ["tasks", "downloads", "model", "sources"]
    with pytest.raises(AssertionError, match="Ray was started"):
        next(findings)
