"""What a recipe says of on-policy training and cannot mean, and reward models that do not belong to its base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from apprentice.data.encoding.prompt_contract import layout_of, make_contract
from apprentice.errors import ModelError, RecipeError
from apprentice.preflight.check import run_check
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe, load_recipe
from apprentice.run.contract import read_contract
from tests.support.on_policy import reward_model, round_recipe
from tests.support.stand_ins import tiny_model_of

WRONG = [
    ({"training__grpo__reward": None}, "objective grpo learns from what a reward model says; name one in `grpo.reward`"),
    ({"training__objective": "sft"}, "the block `grpo` belongs to `objective: grpo`, and the objective is sft"),
    ({"training__steps": None, "training__epochs": 1}, "nothing says where `tokens` or `epochs` end; give `steps`"),
    ({"training__grpo__max_new_tokens": 96}, "max_new_tokens 96 leaves no room for a prompt in data.max_length 96"),
    ({"training__grpo__actors": 9}, "grpo.actors 9 are more than the 8 prompts of a round"),
    ({"tuning__method": "prompt"}, "objective grpo tunes with full, lora or qlora; tuning.method is prompt"),
    ({"data__formats": {"zero_shot": 0.5, "few_shot": 0.5}}, "objective grpo shows no exemplars and inverts nothing"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=[next(iter(changes)) for changes, _ in WRONG])
def test_what_a_recipe_cannot_mean_is_one_sentence(changes, words, tmp_path):
    named = {"training__grpo__reward": "run:reward"} | changes
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(round_recipe(tmp_path, Path("base"), **named))
    assert "\n" not in str(caught.value)


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Recipe:
    with_rounds = load_recipe(round_recipe(tmp_path, tiny_model))
    assert run_check("model", with_rounds)
    return with_rounds


def with_reward(recipe: Recipe, reward: Path) -> Recipe:
    grpo = recipe.training.grpo.model_copy(update={"reward": str(reward)})
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"grpo": grpo})})


def test_a_model_that_writes_is_no_reward_model(recipe, tiny_model):
    with pytest.raises(RecipeError, match=r"training\.grpo\.reward .* writes words and gives an answer no number; name a run with"):
        run_check("model", with_reward(recipe, tiny_model))


def test_a_reward_model_with_another_tokenizer(recipe, tmp_path):
    other = shutil.copytree(str(recipe.training.grpo.reward), tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace("<|pad|>", "<|pod|>"))
    with pytest.raises(RecipeError, match=r"training\.grpo\.reward .* has another tokenizer than model\.base"):
        run_check("model", with_reward(recipe, other))


def test_a_reward_model_of_another_layout(recipe, tmp_path):
    reward = Path(str(recipe.training.grpo.reward))
    plain = recipe.model_copy(update={"data": recipe.data.model_copy(update={"layout": "plain"})})
    make_contract(plain, layout_of(plain, Tokenizer(reward)), reward).write(reward)
    assert read_contract(reward)
    with pytest.raises(RecipeError, match=r"was trained in layout 'plain', and data\.layout is 'chat'"):
        run_check("model", recipe)


def test_a_reward_model_is_not_asked_to_write(recipe, tiny_model, tmp_path):
    judge = reward_model(tmp_path / "judge", tiny_model)
    with pytest.raises(ModelError, match="is a reward model: it gives answers a number and writes none"):
        run_check("model", recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": str(judge)})}))


def test_an_encoder_decoder_is_refused(recipe, tiny_model, tmp_path):
    base = tiny_model_of("t5_v1.1", tiny_model, tmp_path / "t5")
    with pytest.raises(RecipeError, match=r"grpo puts several replies into one row, where they would see each other here"):
        run_check("model", recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": str(base)})}))
