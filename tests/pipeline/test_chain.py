"""Chains: a recipe that starts from another run, what its contract remembers, and what is refused; test_rounds.py runs one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from apprentice import pipeline
from apprentice.data.encoding.prompt_contract import check_base, layout_of, make_contract
from apprentice.errors import ContractError, ModelError, RecipeError
from apprentice.pretrained.hub import local_folder
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe, load_recipe
from apprentice.run.contract import read_contract
from apprentice.run.identity import identity, public_base
from tests.support.recipes import tiny_recipe


def recipe_file(folder: Path, name: str, base: str, **changes: object) -> Path:
    place = folder / name
    place.mkdir()
    return tiny_recipe(place, Path(base), name=name, storage=str(folder / "runs"), model__base=base, **changes)


def trained(folder: Path, model: Path, name: str = "first", layout: str = "chat") -> Path:
    """A run folder with a model, as training leaves it."""
    recipe = load_recipe(tiny_recipe(folder, model, name=name, data__layout=layout))
    place = folder / "runs" / name / "model"
    shutil.copytree(model, place)
    (place.parent / "identity.json").write_text("{}")
    make_contract(recipe, layout_of(recipe, Tokenizer(place)), place, run=name).write(place)
    return place


def second(folder: Path, **changes: object) -> Recipe:
    return load_recipe(recipe_file(folder, "second", "run:first", **changes))


def test_a_run_is_named_by_its_name_wherever_it_lies(tiny_model, tmp_path):
    model = trained(tmp_path, tiny_model)
    recipe = second(tmp_path)
    assert recipe.model.base == f"run:{tmp_path}/runs/first"
    assert local_folder(recipe.model.base) == model
    assert public_base(recipe.model.base) == "run:first"
    assert identity(recipe)["model.base"] == f"run:first@{read_contract(model).weights_sha256[:16]}"
    assert identity(recipe, 1)["model.base"] == "run:first"
    assert load_recipe(_dumped(recipe, tmp_path)) == recipe


def _dumped(recipe: Recipe, folder: Path) -> Path:
    (folder / "again.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return folder / "again.yaml"


def test_all_ancestors_are_kept(tiny_model, tmp_path):
    model = trained(tmp_path, tiny_model)
    recipe = second(tmp_path)
    ancestors = check_base(recipe, model)
    contract = make_contract(recipe, layout_of(recipe, Tokenizer(model)), model, ancestors=ancestors, run="second")
    assert contract.ancestors == (str(tiny_model), "run:first")
    assert contract.base == "run:first"


def test_another_layout_is_refused(tiny_model, tmp_path):
    model = trained(tmp_path, tiny_model)
    with pytest.raises(ContractError, match=r"data.layout is 'plain', but run:first was trained with 'chat'; say layout: chat"):
        check_base(second(tmp_path, data__layout="plain"), model)


def test_another_tokenizer_is_refused(tiny_model, tmp_path):
    model = trained(tmp_path, tiny_model)
    file = model / "tokenizer.json"
    file.write_text(file.read_text().replace("<|pad|>", "<|pod|>"))
    with pytest.raises(ContractError, match=r"the tokenizer in .* is not the one of the contract"):
        check_base(second(tmp_path), model)


def test_a_run_that_is_not_there_or_not_trained(tiny_model, tmp_path):
    trained(tmp_path, tiny_model)
    with pytest.raises(ModelError, match=r"no run 'frist' in .*runs, .* Did you mean 'first'\?"):
        local_folder(f"run:{tmp_path}/runs/frist")
    (tmp_path / "runs" / "first" / "model" / "apprentice.json").unlink()
    with pytest.raises(ModelError, match=r"run 'first', which model.base names, has no trained model yet"):
        local_folder(f"run:{tmp_path}/runs/first")


def test_the_order_is_looked_at_before_anything_is_trained(tmp_path):
    first = load_recipe(recipe_file(tmp_path, "first", "hub/model"))
    after = second(tmp_path)
    pipeline.check_order([first, after])
    with pytest.raises(
        RecipeError, match="'second' starts from run 'first', which is neither trained nor made by a recipe before it"
    ):
        pipeline.check_order([after, first])
    with pytest.raises(RecipeError, match="two of the recipes are called 'first'"):
        pipeline.check_order([first, first])
    other = after.model_copy(update={"data": after.data.model_copy(update={"layout": "alpaca"})})
    with pytest.raises(
        RecipeError, match="'second' has layout 'alpaca', but 'first', which it starts from, is trained with 'chat'"
    ):
        pipeline.check_order([first, other])
