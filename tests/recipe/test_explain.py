"""Explanations of a recipe's keys: every key has one, and its example is one that the recipe takes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from apprentice.cli import app
from apprentice.errors import RecipeError
from apprentice.recipe import Recipe, load_recipe
from apprentice.recipe.explain import all_keys, explain_key
from apprentice.recipe.recipe_file import shipped_recipes


def test_every_key_is_explained() -> None:
    keys = all_keys()
    assert {"seed", "training.optimizer.learning_rate", "data.mixture.groups", "evaluation.gate"} <= {*keys}
    for key in keys:
        explanation = explain_key(key)
        assert explanation.description != "A key of the user's own choice.", key
        assert "anything" not in explanation.type, key


def test_a_key_of_a_block() -> None:
    explanation = explain_key("training.optimizer.learning_rate")
    assert (explanation.type, explanation.is_required, explanation.default) == ("number above 0", False, "0.0002")
    assert explanation.example_from is not None
    assert load_recipe(shipped_recipes()[explanation.example_from]).training.optimizer.learning_rate == float(
        explanation.example or ""
    )


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("training.workers", "  whole number at least 1 or block, default 1"),
        ("data.root", "  text, left out by default"),
        ("model.base", "  text, must be given"),
        ("training.workers.max", "  whole number at least 1, must be given"),
        ("data.mixture.weights.squad", "  number above 0"),
        ("training.tracking", "  list of one of mlflow, wandb, default []"),
    ],
)
def test_types_and_defaults_are_told(key: str, line: str) -> None:
    assert str(explain_key(key)).splitlines()[1] == line


def test_a_key_that_is_not_there() -> None:
    with pytest.raises(
        RecipeError,
        match=r"^'training.optimizer.lerning_rate' is not a key of a recipe. Did you mean 'training.optimizer.learning_rate'\?"
        r" Known in training.optimizer: name, learning_rate,",
    ):
        explain_key("training.optimizer.lerning_rate")


def test_the_command_explains_the_whole_recipe_and_a_key() -> None:
    whole = CliRunner().invoke(app, ["recipe"])
    assert whole.exit_code == 0
    assert all(name in whole.stdout for name in Recipe.model_fields)
    one = json.loads(CliRunner().invoke(app, ["recipe", "training.steps", "--json"]).stdout)
    assert (one["key"], one["default"]) == ("training.steps", "null")
