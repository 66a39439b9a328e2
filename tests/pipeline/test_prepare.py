"""Preparing a run: what an error takes away is what the same call made, and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from apprentice import pipeline
from apprentice.data.corpus import make_corpus
from apprentice.errors import DataError, RunError
from apprentice.pipeline import prepare as preparation
from apprentice.pipeline.project.init import TableDescription, create_project
from apprentice.preflight import check
from apprentice.recipe import Recipe, load_recipe
from apprentice.run import fence
from apprentice.run.fence import FencedError, committed_checkpoints
from apprentice.run.folder import Run
from apprentice.storage import Folder
from tests.support.recipes import tiny_recipe


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """One whose preparation needs no Ray."""
    monkeypatch.setattr(check, "check_before_writing", lambda recipe, connect: None)
    monkeypatch.setattr(preparation, "make_corpus", partial(make_corpus, parallel=False))
    return load_recipe(tiny_recipe(tmp_path, tiny_model, data__tasks=["message_moods"], data__hold_out=[]))


def prepared(recipe: Recipe) -> Run:
    return preparation.prepare_corpus(recipe, restart=False, progress=lambda stage, values: None)[0]


def test_a_missing_column_is_said_before_ray_starts(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start_ray() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(preparation, "ray_session", start_ray)
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps({"question": str(n), "answer": str(n)}) + "\n" for n in range(40)))
    create_project(tmp_path / "sums.jsonl", tmp_path / "sums", TableDescription(), base=str(tiny_model))
    task = tmp_path / "sums" / "task.yaml"
    task.write_text(task.read_text().replace("{{ question }}", "{{ questions }}"))
    recipe = load_recipe(tmp_path / "sums" / "recipe.yaml", [f"storage={tmp_path / 'runs'}"])
    for stage in (pipeline.prepare_run, pipeline.train_run):
        with pytest.raises(DataError, match="no column 'questions'"):
            stage(recipe, progress=lambda stage, values: None)


def refuse(recipe: Recipe, corpus: object) -> str:
    raise DataError("nothing can be learnt from this.")


def content(folder: Folder) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.local.rglob("*.npz")}


def test_an_error_leaves_what_an_earlier_command_prepared(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(recipe)
    assert not run.status(), "nothing was trained here yet"
    before = content(run.index)
    assert before
    monkeypatch.setattr(check, "check_index", refuse)
    with pytest.raises(DataError, match="nothing can be learnt"):
        prepared(recipe)
    assert content(run.index) == before


HOLDS = """
import sys
from apprentice.run import fence
from apprentice.storage import Folder
fence.HEARTBEAT_S = 0.05
with fence.lease_run(Folder.at(sys.argv[1]), "train"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_somebody_holds_is_left_alone(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "POLL_S", 0.1)
    run = prepared(recipe)
    (run.model / "apprentice.json").write_text("{}")
    before = {str(file): file.read_bytes() for file in run.folder.local.rglob("*") if file.is_file()}
    command = [sys.executable, "-c", HOLDS, str(run.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        words = rf"run 'tiny' is held by `train` \(process {other.pid} on .*or stop it with `kill {other.pid}` on"
        for restart in (False, True):
            with (
                pytest.raises(FencedError, match=words),
                preparation.open_for_writing(recipe, "train", restart=restart, progress=lambda stage, values: None),
            ):
                pass
        with pytest.raises(FencedError, match=words):
            pipeline.evaluate_run(recipe, progress=lambda stage, values: None)
        other.communicate()
    assert {name: Path(name).read_bytes() for name in before} == before
    with preparation.open_for_writing(recipe, "train", restart=True, progress=lambda stage, values: None) as (again, _):
        assert not again.is_trained
        assert committed_checkpoints(again.folder) == set()
    assert sorted(child.name for child in run.folder.children()) == [
        "fence",
        "identity.json",
        "index",
        "recipe.yaml",
        "tasks.jsonl",
    ]


def test_an_error_leaves_no_half_made_run_behind(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "check_index", refuse)
    with pytest.raises(DataError, match="nothing can be learnt"):
        prepared(recipe)
    assert not (Path(recipe.storage) / recipe.name).exists()


def test_what_init_wrote_goes_on_wherever_it_is_unpacked(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray unpacks a job's working directory: a folder of another name each time that a file in it changed."""
    monkeypatch.setattr(check, "check_before_writing", lambda recipe, connect: None)
    monkeypatch.setattr(preparation, "make_corpus", partial(make_corpus, parallel=False))
    rows = [{"question": f"What is {number} and one?", "answer": f"It is {number + 1}."} for number in range(40)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    create_project(tmp_path / "sums.jsonl", tmp_path / "_ray_pkg_1", TableDescription(), base=str(tiny_model))
    shared = f"storage={tmp_path / 'shared'}"
    run = prepared(load_recipe(tmp_path / "_ray_pkg_1" / "recipe.yaml", [shared]))
    before = content(run.index)

    shutil.move(tmp_path / "_ray_pkg_1", tmp_path / "_ray_pkg_2")
    (tmp_path / "_ray_pkg_2" / "notes.md").write_text("Something else changed.")
    again = prepared(load_recipe(tmp_path / "_ray_pkg_2" / "recipe.yaml", [shared]))
    assert (again.folder, content(again.index)) == (run.folder, before)

    shutil.move(tmp_path / "_ray_pkg_2", tmp_path / "_ray_pkg_3")
    task = tmp_path / "_ray_pkg_3" / "task.yaml"
    changed = yaml.safe_load(task.read_text())
    changed["templates"][0]["instruction"] += " Please."
    task.write_text(yaml.safe_dump(changed))
    with pytest.raises(RunError, match="the templates or answers of task 'sums' changed"):
        prepared(load_recipe(tmp_path / "_ray_pkg_3" / "recipe.yaml", [shared]))
    assert content(run.index) == before
