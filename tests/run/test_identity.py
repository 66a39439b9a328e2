"""What makes two runs the same: definitions and content, wherever the files lie; runs of format 1 by the paths that they know."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from apprentice.errors import RunError, TaskError
from apprentice.jobs.submit import job_prefix
from apprentice.recipe import Recipe
from apprentice.run.folder import Run, open_run
from apprentice.run.identity import identity, model_sha256
from apprentice.storage import Folder
from apprentice.tasks import registry as loading
from tests.data.small import SUMS
from tests.kept_runs.measure import ARCHIVE, CAPITAL, PLACE, unpack
from tests.tasks.importers.test_natural_instructions import CONTENT
from tests.tasks.importers.test_promptsource import FILE

NAMES = ("finished", "lora", "rounds", "stopped")  # of kept runs


def recipe_in(folder: Path, tasks: list[Any], **data: Any) -> Recipe:
    """A recipe for tasks in `folder`, whose run lies elsewhere."""
    content = {
        "name": "r",
        "storage": str(folder.parent / "runs"),
        "model": {"base": "m"},
        "data": {"tasks": tasks, **data},
        "training": {"steps": 5},
    }
    return Recipe.model_validate(content)


def package(folder: Path, **changes: Any) -> Recipe:
    """A folder with a task file, as Ray unpacks one under another name each time."""
    folder.mkdir()
    (folder / "task.yaml").write_text(yaml.safe_dump(SUMS | changes))
    return recipe_in(folder, [str(folder / "task.yaml")])


def test_workers_that_share_rows_make_no_other_run(tmp_path: Path) -> None:
    alone = recipe_in(tmp_path, ["sst2"])
    shared = {"training": {"steps": 5, "workers": 4, "sequence_parallel": 2}}
    assert identity(Recipe.model_validate(alone.model_dump(exclude_unset=True) | shared)) == identity(alone)


def of_reward(folder: Path, reward: Any) -> dict[str, Any]:
    alone = recipe_in(folder, ["sst2"]).model_dump(exclude_unset=True)
    return identity(Recipe.model_validate(alone | {"training": {"steps": 5, "objective": "grpo", "grpo": {"reward": reward}}}))


def test_a_reward_is_known_by_what_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("raise RuntimeError('nobody runs this')")
    module = tmp_path / "package" / "mine.py"
    module.write_text("def f(**others): return []")
    monkeypatch.chdir(tmp_path)
    own = {"function": "python:package.mine:f"}
    first = of_reward(tmp_path, own)["training.grpo.reward"]
    assert first[0]["function"].startswith("python:package.mine:f@")
    assert of_reward(tmp_path, own | {"cpu_s": 3, "memory_gib": 1})["training.grpo.reward"] == first
    assert of_reward(tmp_path, [own])["training.grpo.reward"] == first
    assert of_reward(tmp_path, own | {"weight": 2})["training.grpo.reward"] != first
    module.write_text("def f(**others): return [1]")
    assert of_reward(tmp_path, own)["training.grpo.reward"] != first
    assert of_reward(tmp_path, {"function": "python:elsewhere:f"})["training.grpo.reward"] == [{"function": "python:elsewhere:f"}]
    assert of_reward(tmp_path, [{"model": "run:/x/judge"}])["training.grpo.reward"] == [{"model": "run:judge"}]
    assert of_reward(tmp_path, "run:/x/judge")["training.grpo.reward"] == "run:judge"  # as ever


def test_a_task_file_that_moved_is_the_same_run(tmp_path: Path) -> None:
    open_run(package(tmp_path / "_ray_pkg_1"))
    run = open_run(package(tmp_path / "_ray_pkg_2"))
    assert str(tmp_path) not in json.dumps((run.folder / "identity.json").read_json())
    assert run.recipe().data.tasks == (str(tmp_path / "_ray_pkg_2" / "task.yaml"),)


def test_another_definition_is_refused_by_the_tasks_name(tmp_path: Path) -> None:
    open_run(package(tmp_path / "_ray_pkg_1"))
    changed = package(tmp_path / "_ray_pkg_2", answer="{{ a - b }}")
    words = r"made with another recipe: the templates or answers of task 'sums' changed\. Choose another `name`"
    with pytest.raises(RunError, match=words):
        open_run(changed)
    with pytest.raises(RunError, match=r"data\.tasks \(\['sums'\] → \['sums', 'sst2'\]\), task 'sst2' came\."):
        open_run(recipe_in(tmp_path / "_ray_pkg_1", [str(tmp_path / "_ray_pkg_1" / "task.yaml"), "sst2"]))


def test_what_only_says_where_rows_lie_changes_nothing(tmp_path: Path) -> None:
    one = package(tmp_path / "one")
    other = package(tmp_path / "other", sources=[{"dataset": "sums"}], summary="Sums.", licence="CC0-1.0")
    assert identity(one) == identity(other)


def collections(folder: Path, **changes: Any) -> Recipe:
    """Every kind of collection, in `folder`."""
    (folder / "glue" / "toy").mkdir(parents=True)
    (folder / "glue" / "toy" / "templates.yaml").write_text(changes.get("templates", FILE))
    (folder / "task1_new.json").write_text(json.dumps(changes.get("instructions", CONTENT)))
    kinds = ("conversations", "preferences", "prompts", "alpaca", "dolly", "self_instruct", "p3")
    files = [{kind: str(folder / f"{kind}.jsonl")} for kind in kinds]
    own = [{"promptsource": "glue/toy"}, {"natural_instructions": str(folder / "*.json"), "negative": 1}]
    return recipe_in(folder, [*own, *files, "sst2", "topic"], promptsource=str(folder))


def test_collections_are_known_by_what_is_in_their_files(tmp_path: Path) -> None:
    here = identity(collections(tmp_path / "here"))
    assert identity(collections(tmp_path / "there")) == here
    assert str(tmp_path) not in json.dumps(here)
    reworded = identity(collections(tmp_path / "reworded", templates=FILE.replace("Same as", "Like")))
    changed = identity(collections(tmp_path / "told", instructions=CONTENT | {"Definition": "Say it twice."}))
    assert {key for key in here if reworded[key] != here[key]} == {"data.tasks.promptsource_glue_toy"}
    assert {key for key in here if changed[key] != here[key]} == {"data.tasks.task1_new"}


def test_the_tasks_are_kept_with_the_run(tmp_path: Path) -> None:
    recipe = collections(tmp_path / "here")
    run = open_run(recipe)
    listed = [(entry, loading.find_tasks(entry, tmp_path)) for entry in recipe.data.entries]
    shutil.rmtree(tmp_path / "here")
    kept = run.tasks()
    for entry, tasks in listed:
        again = kept.find(entry, tmp_path)
        assert again == tasks
        assert [type(task.templates[0]) for task in again] == [type(task.templates[0]) for task in tasks]
    assert kept.find("promptsource_glue_toy", tmp_path) == listed[0][1], "by its name, too"
    assert kept.find("squad", tmp_path) == loading.find_tasks("squad", tmp_path)
    with pytest.raises(TaskError, match="'sst3' is not a task"):
        kept.find("sst3", tmp_path)


def test_a_run_goes_on_with_the_library_of_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_in(tmp_path, ["sst2"])
    run = open_run(recipe)
    [before] = run.tasks().find("sst2", tmp_path)
    reworded = yaml.safe_load(loading.library()["sst2"].read_text())
    reworded["templates"][0]["instruction"] = "Is the film liked?"
    (tmp_path / "sst2.yaml").write_text(yaml.safe_dump(reworded))
    monkeypatch.setattr(loading, "library", lambda: {"sst2": tmp_path / "sst2.yaml"})
    assert loading.find_tasks("sst2", tmp_path) != [before]
    assert open_run(recipe).tasks().find("sst2", tmp_path) == [before]
    [after] = open_run(recipe, restart=True).tasks().find("sst2", tmp_path)
    assert after.templates[0].instruction == "Is the film liked?"


def test_a_models_folder_is_known_by_its_files(tiny_model: Path, tmp_path: Path) -> None:
    def of(base: Path) -> Any:
        recipe = package(base.parent / f"{base.name}-tasks")
        return identity(recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": str(base)})}))["model.base"]

    shutil.copytree(tiny_model, tmp_path / "moved")
    before = of(tmp_path / "moved")
    shutil.copytree(tiny_model, tmp_path / "copy")
    assert of(tmp_path / "copy") == before
    (tmp_path / "moved" / "gate.json").write_text("{}")  # what is written beside the weights later
    (tmp_path / "moved" / "README.md").write_text("A card.")
    assert f"folder@{model_sha256(tmp_path / 'moved')[:16]}" == before
    weights = tmp_path / "moved" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert f"folder@{model_sha256(tmp_path / 'moved')[:16]}" != before


def test_a_base_that_was_trained_again_is_another_one(tmp_path: Path) -> None:
    recipe = package(tmp_path / "tasks")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": f"run:{tmp_path}/first"})})
    contract = Folder.at(tmp_path) / "first" / "model" / "apprentice.json"
    contract.write_json({"weights_sha256": "1" * 64})
    open_run(recipe)
    contract.write_json({"weights_sha256": "2" * 64})
    with pytest.raises(RunError, match=r"another recipe: model\.base \(the run:first holds another model now\)"):
        open_run(recipe)


def test_what_is_on_the_cluster_alone_is_known_by_its_name_when_a_job_is_sent(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="does not exist"):
        identity(recipe_in(tmp_path, ["sst2", "/cluster/task.yaml"]))
    stems = [job_prefix(recipe_in(tmp_path, ["sst2", place])) for place in ("/cluster/task.yaml", "/cluster/other.yaml")]
    assert len(set(stems)) == 2
    one, same, other = (package(tmp_path / name) for name in ("a", "b", "c"))
    (tmp_path / "b" / "notes.md").write_text("Changed between two submissions.")
    assert job_prefix(one) == job_prefix(same) == job_prefix(other)
    assert job_prefix(package(tmp_path / "d", answer="{{ a - b }}")) != job_prefix(one)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_format_1_is_compared_by_its_formula(name: str) -> None:
    with tarfile.open(ARCHIVE) as archive:
        texts = [
            archive.extractfile(f"runs/{name}/{file}").read().decode().replace(PLACE, f"/{CAPITAL}runs")  # type: ignore[union-attr]
            for file in ("recipe.yaml", "identity.json")
        ]
    assert identity(Recipe.model_validate(yaml.safe_load(texts[0])), 1) == json.loads(texts[1])["keys"]


def test_a_run_of_format_1_opens_and_stays_one(tmp_path: Path) -> None:
    folder = unpack(tmp_path / CAPITAL)
    for name in NAMES:
        run = Run(Folder.at(folder / "runs" / name))
        before = (run.folder / "identity.json").read_json()["keys"]
        assert open_run(run.recipe()) == run
        after = (run.folder / "identity.json").read_json()
        assert (run.format, after["format"], after["keys"]) == (1, 1, before)
    other = run.recipe().model_copy(update={"seed": 8})
    with pytest.raises(RunError, match=r"seed \(3 → 8\)"):
        open_run(other)
    assert open_run(other, restart=True).format == 2
