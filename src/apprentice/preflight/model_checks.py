"""Checks of a recipe's base model: tokenizer, chat template, context length and serving engine."""

from __future__ import annotations

from pathlib import Path

from apprentice.data.corpus import packing_strategy
from apprentice.data.encoding.prompt_contract import check_base, layout_of, layout_version
from apprentice.data.encoding.prompt_format import Layout
from apprentice.data.encoding.quality import are_classes_shown, layout_of_each_class
from apprentice.errors import ChatTemplateError, ContractError, RecipeError, ServingError
from apprentice.preflight.auxiliary_models import check_auxiliary_models
from apprentice.preflight.lookup import RecipeLookup
from apprentice.pretrained.architecture import RELATIVE_POSITIONS, check_generates_text, model_config
from apprentice.recipe import Recipe
from apprentice.run.identity import public_base


def check_model(lookup: RecipeLookup) -> str:
    """Checks the base model with its tokenizer, chat template, context length, auxiliary models and serving engine.

    Returns one sentence on the prompt format. Raises `ModelError`, `ContractError`, `RecipeError` or `ServingError`.
    """
    from apprentice.pretrained.trust import check_model_folder

    recipe, tokenizer = lookup.recipe, lookup.tokenizer
    check_model_folder(tokenizer.folder, trust=recipe.model.trust)
    layout = layout_of(recipe, tokenizer, layout_version(lookup.run.format))
    _check_chat_template(layout)
    ancestors = check_base(recipe, tokenizer.folder)
    packing_strategy(recipe, tokenizer.folder)
    _check_length(recipe, tokenizer.folder)
    check_auxiliary_models(recipe, tokenizer)
    _check_engine(recipe, tokenizer.folder)
    _check_shared_rows(recipe, tokenizer.folder)
    _check_layers(recipe, tokenizer.folder)
    if not recipe.training.aim.head:
        check_generates_text(tokenizer.folder)
    line = " → ".join([*ancestors, public_base(recipe.model.base)])
    more = ""
    if (qualities := recipe.data.qualities) is not None:
        classes = ", ".join(f"{name} ({quality.weight:g})" for name, quality in qualities.items())
        more = (
            f", classes {classes} {'' if are_classes_shown(layout_of_each_class(qualities, layout)) else 'not '}shown in the prompt"
        )
    more += layout.turns.remarks if layout.turns is not None else ""
    return f"{line}, layout {layout.name}, an answer ends with {tokenizer.decode(layout.end_ids, skip_special=False)!r}{more}"


def _check_length(recipe: Recipe, folder: Path) -> None:
    """Raises `RecipeError` if `data.max_length` exceeds the number of positions of the model."""
    config = model_config(folder)
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if config.get("model_type") in RELATIVE_POSITIONS:
        positions = None
    if positions is not None and recipe.data.max_length > positions:
        raise RecipeError(
            f"data.max_length {recipe.data.max_length} is more than the {positions} positions of"
            f" {public_base(recipe.model.base)}; lower it, or name a model with a longer context."
        )


def _check_engine(recipe: Recipe, folder: Path) -> None:
    """Raises `ServingError` if the recipe's serving engine, installed or not, cannot decode the model that the recipe trains."""
    from apprentice.model_pool.engine_choice import check_decodes

    engine, method = recipe.serving.engine, recipe.tuning.method
    check_decodes(engine, folder)
    if engine != "vllm":
        return
    from apprentice.models.tuning.methods import TUNING_METHODS  # imports PyTorch

    if TUNING_METHODS[method].merge is None:
        raise ServingError(
            f"serving.engine vllm would leave out what tuning.method {method} trains, which cannot become part of the weights; use"
            " serving.engine transformers, or tuning.method lora."
        )


def _check_shared_rows(recipe: Recipe, folder: Path) -> None:
    """Raises `ModelError` if workers are to share rows of a model whose rows they cannot share."""
    if recipe.training.sequence_parallel > 1:
        from apprentice.models.loading import check_rows_can_be_shared

        check_rows_can_be_shared(folder, recipe.training.sequence_parallel, trust=recipe.model.trust)


def _check_layers(recipe: Recipe, folder: Path) -> None:
    """Raises `ModelError` if layers are to be compiled that cannot be."""
    if recipe.training.compile:
        from apprentice.models.acceleration.compilation import check_compiles
        from apprentice.models.loading import read_config

        check_compiles(read_config(folder, trust=recipe.model.trust))


def _check_chat_template(layout: Layout) -> None:
    """Raises `ContractError` if the chat template refuses a question, or ends turns with tokens that an answer may hold."""
    try:
        layout.prompt("a")
    except ChatTemplateError as error:
        where = " after data.system" if layout.system else ""
        raise ContractError(
            f"the chat template of {layout.tokenizer.folder} refuses a question{where}: {' '.join(str(error.__cause__).split())}."
            " Leave out what it has no turn for, or give another in data.chat_template."
        ) from error
    if layout.name == "chat" and not layout.tokenizer.is_added(layout.end_ids[-1]):
        end = layout.tokenizer.decode(layout.end_ids, skip_special=False)
        raise ContractError(
            f"the chat template ends an answer with {end!r}, which is {len(layout.end_ids)} ordinary tokens to this tokenizer: a"
            " reply would stop wherever it comes to the last of them. End turns with `{{ eos_token }}` in data.chat_template, or"
            " name a base that has it as a token of its own."
        )
