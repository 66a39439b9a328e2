"""Preparing a run: what an error takes away is what the same call made, and nothing else."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from apprentice import check
from apprentice.artifacts import Run
from apprentice.data.corpus import make_corpus
from apprentice.errors import DataError
from apprentice.recipe import Recipe, load_recipe
from apprentice.road import data
from apprentice.storage import Folder
from tests.recipes import tiny_recipe


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """One whose preparation needs no Ray."""
    monkeypatch.setattr(check, "before_writing", lambda recipe: None)
    monkeypatch.setattr(data, "make_corpus", partial(make_corpus, parallel=False))
    return load_recipe(tiny_recipe(tmp_path, tiny_model, data__tasks=["message_moods"], data__hold_out=[]))


def prepared(recipe: Recipe) -> Run:
    return data.prepared(recipe, restart=False, progress=lambda stage, values: None)[0]


def refuse(recipe: Recipe, corpus: object) -> str:
    raise DataError("nothing can be learnt from this.")


def content(folder: Folder) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.local.rglob("*.npz")}


def test_an_error_leaves_what_an_earlier_command_prepared(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(recipe)
    assert not run.status(), "nothing was trained here yet"
    before = content(run.index)
    assert before
    monkeypatch.setattr(check, "after_indexing", refuse)
    with pytest.raises(DataError, match="nothing can be learnt"):
        prepared(recipe)
    assert content(run.index) == before


def test_an_error_leaves_no_half_made_run_behind(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "after_indexing", refuse)
    with pytest.raises(DataError, match="nothing can be learnt"):
        prepared(recipe)
    assert not (Path(recipe.storage) / recipe.name).exists()
