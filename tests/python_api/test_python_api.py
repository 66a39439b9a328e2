"""The Python API: its names, what importing it loads, recipes made in Python, and what notebooks show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import apprentice
from apprentice.preflight.check import Finding
from apprentice.recipe import dump_recipe, load_recipe
from tests.support.recipes import tiny_recipe

HEAVY = {"torch", "ray", "transformers", "deepspeed", "datasets", "pandas", "pyarrow", "pydantic", "numpy"}


def test_importing_it_loads_nothing_heavy() -> None:
    program = f"import sys, apprentice, json; print(sorted({HEAVY!r} & set(sys.modules)), apprentice.__version__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"[] {apprentice.__version__}\n"


def test_every_public_name_is_there_documented_and_listed() -> None:
    assert sorted(apprentice.__all__) == apprentice.__all__ == dir(apprentice)
    for name in apprentice.__all__:
        assert getattr(apprentice, name) is not None
        assert name == "__version__" or getattr(apprentice, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Recipes'"):
        apprentice.Recipes  # noqa: B018
    for kind in (apprentice.RecipeError, apprentice.RunError, apprentice.TaskError, apprentice.RowError):
        assert issubclass(kind, apprentice.ApprenticeError)


def test_a_recipe_made_in_python_is_that_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text("name: a\nmodel: {base: ./m}\ndata: {tasks: [quickstart, ./own.yaml]}\ntraining: {steps: 5}\n")
    read = apprentice.Recipe.load(file, "training.steps=7")
    made = apprentice.Recipe(name="a", model={"base": "./m"}, data={"tasks": ["quickstart", "./own.yaml"]}, training={"steps": 5})
    assert read == made.override("training.steps=7")
    assert dump_recipe(read) == dump_recipe(load_recipe(file, ["training.steps=7"]))
    assert made.model.base == str(tmp_path / "m")
    assert made.run.folder == apprentice.Run(made.run.folder).folder
    assert str(made.run.folder) == str(tmp_path / "runs" / "a")
    assert repr(made).startswith("Recipe(name='a'")
    assert apprentice.Recipe.load("quickstart").name == "quickstart"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"trainning": {}}, r"^recipe: trainning: not a key of a recipe. Did you mean 'training'\? Known here: name, "),
        ({"training": {"steps": "many"}}, r"^recipe: training.steps: a whole number is needed \(it is 'many'\)\.$"),
        ({"training": {}}, r"^recipe: training: "),
    ],
)
def test_a_wrong_recipe_raises_the_sentence_of_a_file_without_its_line(values: dict, sentence: str) -> None:
    with pytest.raises(apprentice.RecipeError, match=sentence):
        apprentice.Recipe(**{"name": "a", "model": {"base": "m"}, "data": {"tasks": ["quickstart"]}, **values})


def test_a_wrong_override_is_named() -> None:
    with pytest.raises(apprentice.RecipeError, match=r"^override 'training.stepps=1': training.stepps: not a key"):
        apprentice.Recipe.load("quickstart").override("training.stepps=1")


def test_a_run_that_is_not_there_is_told_as_by_the_command(tmp_path: Path) -> None:
    with pytest.raises(apprentice.RunError, match=r"^'none' is not a run in .*; `apprentice runs` lists them\.$"):
        apprentice.Run.open("none", storage=str(tmp_path))
    assert apprentice.list_runs(str(tmp_path)) == []


def test_a_run_tells_of_its_steps(tmp_path: Path) -> None:
    run = apprentice.Recipe.load("quickstart", f"storage={tmp_path}").run
    (run.folder / "identity.json").write_json({"keys": {}})
    lines = ['{"step": 1, "loss": 3.0, "examples": [0]}', '{"step": 2, "loss": 2.0}', '{"step": 2, "validation_loss": 2.5}']
    again = ['{"step": 2, "loss": 1.5}', '{"step": 2, "message": "said"}', '{"step": 3, "lo']
    (run.folder / "steps.jsonl").write_text("\n".join([*lines, *again]))
    run.update_status(state="<training>", step=2, steps=9, loss=1.5)
    opened = apprentice.Run.open("quickstart", storage=str(tmp_path))
    assert [record["step"] for record in opened.metrics()] == [1, 2, 2, 2, 2]
    frame = opened.metrics_frame()
    assert frame["step"].tolist() == [1, 2]
    assert frame["loss"].tolist() == [3.0, 1.5]
    assert frame["validation_loss"].tolist()[1] == 2.5
    assert list(frame.columns) == ["step", "loss", "validation_loss"]
    assert [one.name for one in apprentice.list_runs(str(tmp_path))] == ["quickstart"]
    shown = opened._repr_html_()
    assert "&lt;training&gt;" in shown
    assert "<training>" not in shown
    with pytest.raises(apprentice.EvaluationError, match="has no report yet; score it first with `evaluate`"):
        opened.last_report()


def test_findings_are_text_and_html() -> None:
    result = apprentice.CheckResult((Finding("tasks", True, "2 tasks"), Finding("model", False, "no <model> & none")))
    assert not result.is_ready
    assert [finding.subject for finding in result] == ["tasks", "model"]
    assert str(result) == "ok tasks      2 tasks\nNO model      no <model> & none\nnot ready"
    assert "no &lt;model&gt; &amp; none" in result._repr_html_()
    assert "<model>" not in result._repr_html_()


def test_a_check_finds_what_the_command_finds(tmp_path: Path, tiny_model: Path) -> None:
    recipe = apprentice.Recipe.load(tiny_recipe(tmp_path, tiny_model))
    assert recipe.check(fast=True).is_ready
    wrong = recipe.override("model.base=/nowhere")
    result = wrong.check(fast=True)
    assert not result.is_ready
    assert [finding.subject for finding in result if not finding.ok] == ["model"]
    with pytest.raises(apprentice.RunError, match="has no trained model yet; train it first"):
        recipe.evaluate()


def test_a_task_renders_a_wording_by_its_name() -> None:
    [task] = apprentice.find_tasks("sst2")
    example = task.render(dict(task.sample or {}), task.templates[0].name)
    assert isinstance(example, apprentice.Example)
    assert example.template == task.templates[0].name
    with pytest.raises(apprentice.TaskError, match=r"^task 'sst2' has no template 'thumb'\. Did you mean 'thumbs'\?"):
        task.render(dict(task.sample or {}), "thumb")
