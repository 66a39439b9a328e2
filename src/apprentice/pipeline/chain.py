"""Order checks for a chain of recipes, each of which may start from the run of an earlier one.

The order and the prompt formats are checked before anything is trained. A base's own prompt contract is checked when its
recipe's turn comes.
"""

from __future__ import annotations

from collections.abc import Sequence

from apprentice.errors import RecipeError
from apprentice.recipe import RUN, Recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder


def check_order(recipes: Sequence[Recipe]) -> None:
    """Raises `RecipeError` unless every `run:` model is trained already or made by an earlier recipe with the same layout.

    Two recipes with one run folder, or a `data.chat_template` that differs from the base's, are refused as well.
    """
    earlier: dict[str, Recipe] = {}
    for recipe in recipes:
        folder = str(Folder.at(recipe.storage) / recipe.name)
        if folder in earlier:
            raise RecipeError(
                f"two of the recipes are called {recipe.name!r} and would share one run; give each a name of its own."
            )
        beside = {"is held to": recipe.training.reference, "is rewarded by": recipe.training.grpo.reward_model}
        for what, name in {"starts from": recipe.model.base, **beside}.items():
            if name and name.startswith(RUN):
                _check_base(recipe, what, name, earlier)
        earlier[folder] = recipe


def _check_base(recipe: Recipe, what: str, name: str, earlier: dict[str, Recipe]) -> None:
    place = str(Folder.at(name.removeprefix(RUN)))
    before = earlier.get(place)
    if before is None:
        if not Run(Folder(place)).is_trained:
            raise RecipeError(
                f"recipe {recipe.name!r} {what} run {Folder(place).name!r}, which is neither trained nor made by a recipe"
                " before it; put that recipe first."
            )
    elif before.data.layout != recipe.data.layout:
        raise RecipeError(
            f"recipe {recipe.name!r} has layout {recipe.data.layout!r}, but {before.name!r}, which it {what}, is trained with"
            f" {before.data.layout!r}; use one layout in the whole chain."
        )
    elif name == recipe.model.base and recipe.data.chat_template not in (None, before.data.chat_template):
        raise RecipeError(
            f"recipe {recipe.name!r} has another data.chat_template than its base {before.name!r}; leave it out, since the base"
            " brings its own."
        )
