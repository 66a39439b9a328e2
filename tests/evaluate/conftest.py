"""A small corpus of built-in tasks, indexed in this process, for everything that is evaluated here."""

from __future__ import annotations

from pathlib import Path

import pytest

from apprentice.data.corpus import Corpus, make_corpus
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder


@pytest.fixture(scope="session")
def recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "small",
            "seed": 5,
            "storage": str(tmp_path_factory.mktemp("evaluate")),
            "model": {"base": str(tiny_model), "dtype": "float32"},
            "data": {
                "tasks": ["same_meaning", "short_reviews", "passage_questions", "written_dates"],
                "hold_out": ["sentiment"],
                "max_length": 700,
            },
            "training": {"steps": 1},
            "evaluation": {"shots": [0, 2], "max_examples": 5, "templates_per_row": 2, "max_new_tokens": 6},
        }
    )


@pytest.fixture(scope="session")
def corpus(recipe: Recipe) -> Corpus:
    return make_corpus(recipe, Run(Folder.at(recipe.storage) / recipe.name), parallel=False)
