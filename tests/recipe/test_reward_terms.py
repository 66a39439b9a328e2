"""Rewards in a recipe: the forms that are read, and one sentence for what cannot be meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apprentice.errors import RecipeError
from apprentice.recipe import Recipe, RewardTerm, dump_recipe, load_recipe
from tests.support.on_policy import round_recipe


def of_reward(folder: Path, reward: Any, overrides: tuple[str, ...] = (), **changes: Any) -> Recipe:
    return load_recipe(round_recipe(folder, Path("base"), training__grpo__reward=reward, **changes), overrides)


def test_one_function_a_list_and_a_model_alone(tmp_path: Path) -> None:
    grpo = of_reward(tmp_path, {"function": "math"}).training.grpo
    assert (grpo.reward_terms, grpo.reward_model) == ((RewardTerm(function="math"),), None)
    terms = [{"function": "regex", "pattern": r"\d+", "weight": 0.5}, {"model": "run:judge"}, {"function": "python:a.b:c"}]
    recipe = of_reward(tmp_path, terms)
    assert [term.weight for term in recipe.training.grpo.reward_terms] == [0.5, 1.0, 1.0]
    assert recipe.training.grpo.reward_model == f"run:{recipe.storage}/judge"
    assert recipe.training.models == {"training.grpo.reward": f"run:{recipe.storage}/judge"}
    alone = of_reward(tmp_path, "run:judge").training.grpo
    assert alone.reward == alone.reward_model == alone.reward_terms[0].model == f"run:{recipe.storage}/judge"


def test_a_dumped_recipe_is_the_same(tmp_path: Path) -> None:
    schema = {"function": "json_schema", "json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    recipe = of_reward(tmp_path, [{"function": "math"}, schema, {"model": "./judge"}])
    (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "dumped.yaml") == recipe
    assert recipe.training.grpo.reward_model == str(tmp_path / "judge")


def test_overrides_name_a_term_or_one_of_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert of_reward(tmp_path, [{"function": "math"}], ("training.grpo.reward.function=exact_match",)).training.grpo.reward == (
        RewardTerm(function="exact_match")
    )
    changed = of_reward(tmp_path, "run:judge", ("training.grpo.reward=[{model: ./here}, {function: math}]",))
    assert changed.training.grpo.reward_model == str(tmp_path / "here")


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (
            {"function": "maths"},
            r"reward\.function: it must be one of exact_match, math, json_schema, regex or python:MODULE:FUNCTION",
        ),
        ({"function": "python:module"}, "or python:MODULE:FUNCTION .it is 'python:module'"),
        ({"function": "regex", "pattern": "(a"}, "the pattern is no regular expression of Python: missing"),
        ({"function": "regex"}, "`pattern` belongs to function regex, and only to it; this is regex"),
        ({"function": "math", "json_schema": {}}, "`json_schema` belongs to function json_schema, and only to it; this is math"),
        ({"function": "math", "model": "run:judge"}, "names either a `function` or a `model`"),
        ({"weight": 2}, "names either a `function` or a `model`"),
        ({"function": "math", "weight": 0}, "a term with weight 0 is worth nothing"),
        ({"function": "math", "wieght": 1}, r"reward\.wieght: not a key of a recipe\. Did you mean 'weight'"),
        ([], "`reward` lists no terms"),
        ([{"model": "run:a"}, {"model": "run:b"}], "names more than one reward model"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(reward: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        of_reward(tmp_path, reward)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("overlong_tokens", 9, "overlong_tokens 9 are more than a reply's max_new_tokens 8"),
        ("staleness", 2, r"grpo\.staleness: it must be 0 or 1"),
        ("loss_mean", "token", r"grpo\.loss_mean: it must be 'replies', 'tokens' or 'max_new_tokens'"),
        ("redraws", -1, r"grpo\.redraws: it must be greater than or equal to 0"),
    ],
)
def test_what_a_correction_cannot_be(key: str, value: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        of_reward(tmp_path, {"function": "math"}, **{f"training__grpo__{key}": value})
