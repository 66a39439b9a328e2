"""Run folders: what makes two runs the same, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apprentice.errors import ContractError, RunError
from apprentice.recipe import Recipe
from apprentice.run.contract import PromptContract, read_contract, weights_sha256
from apprentice.run.folder import Run, find_run, open_run
from apprentice.run.identity import identity
from apprentice.storage import Folder


def recipe(tmp_path: Path, **changes) -> Recipe:
    content = {
        "name": "r",
        "storage": str(tmp_path),
        "model": {"base": "m"},
        "data": {"tasks": ["sst2"]},
        "training": {"steps": 5, "global_batch": 4, "workers": 2},
    }
    for key, value in changes.items():
        place = content
        *parents, last = key.split("__")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return Recipe.model_validate(content)


SAME = {
    "training__workers": 1,
    "training__micro_batch": 2,
    "training__max_failures": 0,
    "evaluation__max_examples": 3,
    "serving__port": 1,
}
OTHER = {
    "seed": 1,
    "data__tasks": ["snli"],
    "training__steps": 6,
    "tuning__rank": 2,
    "model__base": "n",
    "training__global_batch": 8,
}


@pytest.mark.parametrize(("key", "value"), SAME.items())
def test_keys_that_do_not_shape_learning(tmp_path, key, value):
    assert identity(recipe(tmp_path, **{key: value})) == identity(recipe(tmp_path))


@pytest.mark.parametrize(("key", "value"), OTHER.items())
def test_keys_that_shape_learning(tmp_path, key, value):
    changed = identity(recipe(tmp_path, **{key: value}))
    original = identity(recipe(tmp_path))
    differing = {name for name in original.keys() | changed.keys() if original.get(name) != changed.get(name)}
    of_tasks = {"data.tasks.sst2", "data.tasks.snli"}
    assert differing - of_tasks == {key.replace("__", ".")}
    assert (differing & of_tasks == of_tasks) == (key == "data__tasks")


def test_the_same_run_is_opened_again_and_another_is_refused(tmp_path):
    run = open_run(recipe(tmp_path))
    run.update_status(state="training", step=3)
    assert open_run(recipe(tmp_path, training__workers=1)).status()["step"] == 3
    with pytest.raises(RunError, match=r"training\.steps \(5 → 6\)") as caught:
        open_run(recipe(tmp_path, training__steps=6))
    assert "--restart" in str(caught.value)
    assert run.recipe().training.steps == 5
    assert open_run(recipe(tmp_path, training__steps=6), restart=True).status() == {}


def test_a_key_that_a_later_version_brought_changes_nothing_until_it_is_used(tmp_path):
    run = open_run(recipe(tmp_path))
    file = run.folder / "identity.json"
    content = file.read_json()
    del content["keys"]["tuning.dropout"]  # as a version without that key wrote it
    file.write_json(content)
    assert open_run(recipe(tmp_path)).name == "r"
    file.write_json(content)
    with pytest.raises(RunError, match=r"tuning\.dropout \(None → 0\.1\)"):
        open_run(recipe(tmp_path, tuning__dropout=0.1))


def test_runs_are_found_by_name_and_by_path(tmp_path):
    run = open_run(recipe(tmp_path))
    assert find_run("r", str(tmp_path)) == run
    assert find_run(str(tmp_path / "r")) == run
    assert find_run("other", str(tmp_path)) is None
    assert run.recipe() == recipe(tmp_path)


def test_a_contract_that_cannot_be_understood_is_refused(tmp_path):
    assert read_contract(tmp_path) is None
    (tmp_path / "apprentice.json").write_text('{"version": 1}')
    with pytest.raises(ContractError, match="not a prompt contract"):
        read_contract(tmp_path)
    assert not Run(Folder.at(tmp_path)).is_trained


def test_keys_that_came_later_count_once_they_are_used(tmp_path):
    before = identity(recipe(tmp_path))
    assert not [key for key in before if key.startswith(("training.objective", "training.dpo"))]
    dpo = identity(recipe(tmp_path, data__max_length=512, training__objective="dpo", training__dpo={"beta": 0.2}))
    assert {key: dpo[key] for key in dpo.keys() - before.keys()} == {"training.objective": "dpo", "training.dpo.beta": 0.2}
    tuned = identity(recipe(tmp_path, tuning={"rslora": True}, training__optimizer={"loraplus_ratio": 16.0}))
    added = {key: tuned[key] for key in tuned.keys() - before.keys()}
    assert added == {"tuning.rslora": True, "training.optimizer.loraplus_ratio": 16.0}
    open_run(recipe(tmp_path, data__max_length=512))
    with pytest.raises(RunError, match=r"training\.objective \(None → 'dpo'\)"):
        open_run(recipe(tmp_path, data__max_length=512, training__objective="dpo"))


def test_an_adapter_beside_the_weights_counts_with_them(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"base")
    bare = weights_sha256(tmp_path)
    (tmp_path / "adapter").mkdir()
    hashes = set()
    for content in (b"one", b"other"):
        (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(content)
        hashes.add(weights_sha256(tmp_path))
    assert len(hashes) == 2
    assert bare not in hashes


def test_the_contracts_committed_schema_is_that_of_the_class() -> None:
    """`apprentice contract-schema > docs/contract.schema.json` writes it again."""
    file = Path(__file__).parents[2] / "docs" / "contract.schema.json"
    assert json.loads(file.read_text(encoding="utf-8")) == PromptContract.model_json_schema()
