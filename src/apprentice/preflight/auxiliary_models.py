"""Checks of the models that a recipe names beside its base: a reference, and the reward model of on-policy training."""

from __future__ import annotations

from apprentice.errors import RecipeError
from apprentice.pretrained.architecture import family_of, gives_rewards
from apprentice.pretrained.hub import local_folder
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.contract import read_contract
from apprentice.run.identity import public_base


def check_auxiliary_models(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Raises `RecipeError` if such a model has another tokenizer than `tokenizer`, the base's.

    A reward model must also give a number for a reply, and be trained with the recipe's prompt format.
    """
    if reference := recipe.training.reference:
        key = f"training.{recipe.training.objective}.{'teacher' if recipe.training.aim.teacher else 'reference'}"
        remedy = " Name" if recipe.training.aim.teacher else " Leave it out (the base is the reference), or name"
        _check_tokens(key, reference, recipe, tokenizer, remedy)
        if recipe.training.aim.teacher and family_of(tokenizer.folder) != "causal":
            raise RecipeError(
                f"training.objective distill compares causal models token by token, and model.base"
                f" {public_base(recipe.model.base)} reads prompts with an encoder; use objective sft on the teacher's replies."
            )
    if reward := recipe.training.grpo.reward_model:
        folder = local_folder(reward)
        if not gives_rewards(folder):
            raise RecipeError(
                f"training.grpo.reward {public_base(reward)} writes words and gives an answer no number; name a run with"
                " `training.objective: reward`, or another model that does."
            )
        _check_tokens("training.grpo.reward", reward, recipe, tokenizer, " Name")
        contract = read_contract(folder)
        if contract is not None and contract.layout != recipe.data.layout:
            raise RecipeError(
                f"training.grpo.reward {public_base(reward)} was trained in layout {contract.layout!r}, and data.layout is"
                f" {recipe.data.layout!r}: it would read prompts that it never saw; use one layout for both."
            )


def _check_tokens(key: str, name: str, recipe: Recipe, tokenizer: Tokenizer, remedy: str) -> None:
    folder = local_folder(name)
    if family_of(folder) != "causal" or Tokenizer(folder).fingerprint != tokenizer.fingerprint:
        raise RecipeError(
            f"{key} {public_base(name)} has another tokenizer than model.base {public_base(recipe.model.base)}:"
            f" the same answer would be other tokens to it.{remedy} a model of its kind."
        )
