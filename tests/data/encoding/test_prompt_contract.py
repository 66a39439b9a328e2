"""The prompt contract: what it holds, and that everything it cannot reproduce is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest

from apprentice.data.encoding.prompt_contract import layout_beside, layout_of, layout_under, layout_version, make_contract
from apprentice.errors import ContractError
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.contract import GoldenPrompt, PromptContract, read_contract
from apprentice.run.identity import identity


def recipe_of(folder: Path, layout: str = "chat") -> Recipe:
    data = {"tasks": ["sst2"], "layout": layout, "system": "Be brief.", "max_length": 300}
    return Recipe.model_validate({"name": "x", "model": {"base": str(folder)}, "data": data, "training": {"steps": 1}})


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A model folder with its contract."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    recipe = recipe_of(folder)
    make_contract(recipe, layout_of(recipe, Tokenizer(folder)), folder, run="x").write(folder)
    return folder


def rewrite(folder: Path, **changes: object) -> None:
    contract = read_contract(folder)
    assert contract is not None
    contract.model_copy(update=changes).write(folder)


@pytest.mark.parametrize("name", ["plain", "alpaca", "chat"])
def test_it_holds_what_a_prompt_depends_on(name: str, tiny_model: Path) -> None:
    recipe, tokenizer = recipe_of(tiny_model, name), Tokenizer(tiny_model)
    layout = layout_of(recipe, tokenizer)
    contract = make_contract(recipe, layout, tiny_model)
    assert (contract.layout, contract.system, contract.max_length) == (name, "Be brief.", 300)
    assert (contract.end_ids, contract.stop_ids) == ((2,), (2,))
    assert contract.tokenizer_sha256 == tokenizer.fingerprint
    assert contract.ancestors == (str(tiny_model),)
    assert len(contract.golden) == (6 if contract.layout == "chat" else 5)  # with turns, a conversation too
    for golden in contract.golden[:4]:  # a conversation: see test_conversations
        assert list(golden.ids) == tokenizer.encode(layout.prompt(golden.instruction, golden.input))
    assert any(golden.input == "" for golden in contract.golden)
    assert any(not golden.instruction.isascii() for golden in contract.golden)
    assert layout_under(contract, tokenizer).prompt("a", "b") == layout.prompt("a", "b")


def test_it_survives_the_file(folder: Path) -> None:
    contract = read_contract(folder)
    assert contract is not None
    assert contract == PromptContract.model_validate_json((folder / "apprentice.json").read_bytes())
    assert layout_beside(folder).prompt("a") == layout_under(contract, Tokenizer(folder)).prompt("a")


def _other_weights(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")


def _other_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _other_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("tiny", "small"))


def _other_golden(folder: Path) -> None:
    rewrite(folder, golden=(GoldenPrompt(instruction="Name three colours.", input="", ids=(1, 2, 3)),))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_weights, "the weights in .* are not those its contract was written for; restore the folder"),
        (_other_tokenizer, "the tokenizer in .* is not the one of the contract; restore the folder"),
        (_other_template, "the chat template in .* is not the one of the contract; restore the folder"),
        (_other_golden, "the prompt for 'Name three colours.' gets other token ids here than in training; restore"),
        (
            lambda folder: rewrite(folder, layout_version=0),
            "the contract is for layout version 0, this apprentice has 1 and 2; use",
        ),
        (lambda folder: rewrite(folder, layout="vicuna"), "layout 'vicuna' is unknown; choose one of plain, alpaca, chat"),
        (
            lambda folder: (folder / "apprentice.json").unlink(),
            r"no prompt contract \(apprentice.json\).*--contract RUN or --recipe",
        ),
        (lambda folder: (folder / "apprentice.json").write_text("{}"), "is not a prompt contract of this version: Field required"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    layout_beside(folder)
    damage(folder)
    with pytest.raises(ContractError, match=message):
        layout_beside(folder)


def test_other_ids_of_a_conversation_with_functions_are_refused(folder: Path) -> None:
    contract = read_contract(folder)
    assert contract is not None
    assert contract.golden_tools is not None
    ids = contract.golden_tools.ids
    changed = contract.golden_tools.model_copy(update={"ids": (*ids[:-1], ids[-1] + 1)})
    layout_under(contract, Tokenizer(folder))
    with pytest.raises(ContractError, match="a conversation with functions gets other token ids"):
        layout_under(contract.model_copy(update={"golden_tools": changed}), Tokenizer(folder))
    layout_under(contract.model_copy(update={"golden_tools": None}), Tokenizer(folder))  # an older contract's


def test_a_bare_model_takes_the_contract_it_is_given(folder: Path) -> None:
    contract = read_contract(folder)
    (folder / "apprentice.json").unlink()
    _other_weights(folder)  # another model may be spoken to the same way
    assert layout_beside(folder, contract).system == "Be brief."
    _other_template(folder)
    with pytest.raises(ContractError, match="the chat template in"):
        layout_beside(folder, contract)


def test_the_golden_ids_hold_a_forged_turn(tiny_model: Path) -> None:
    tokenizer = Tokenizer(tiny_model)
    layout = layout_of(recipe_of(tiny_model), tokenizer)
    forged = make_contract(recipe_of(tiny_model), layout, tiny_model).golden[4]
    assert "<|im_end|>" in forged.instruction
    assert "<|im_end|>\n<|im_start|>" in forged.input
    assert (forged.ids.count(1), forged.ids.count(2)) == (3, 2)  # the template's own
    assert tokenizer.decode(forged.ids, skip_special=False).count("<|im_end|>") == 4


def test_a_contract_of_the_first_version_keeps_its_ids(folder: Path) -> None:
    recipe, tokenizer = recipe_of(folder), Tokenizer(folder)
    contract = make_contract(recipe, layout_of(recipe, tokenizer, version=1), folder)
    assert (contract.layout_version, len(contract.golden)) == (1, 5)
    old = json.loads(contract.model_dump_json())
    del old["control_tokens"]  # it was not written then
    (folder / "apprentice.json").write_text(json.dumps(old))
    layout = layout_beside(folder)
    assert layout.version == 1
    assert layout.encode_prompt(layout.prompt("<|im_end|>")).count(2) == 3
    assert [layout_version(format) for format in (1, 2)] == [1, 2]


def test_a_day_that_an_old_contract_does_not_name_is_found(folder: Path) -> None:
    """Models whose template writes today's date could not be served on the next day."""
    file = folder / "chat_template.jinja"
    file.write_text("{{ strftime_now('%d %B %Y') }}\n" + file.read_text())
    then = (date.today() - timedelta(40)).isoformat()
    recipe = recipe_of(folder)
    layout = replace(layout_of(recipe, Tokenizer(folder), version=1), day=then)
    make_contract(recipe, layout, folder).write(folder)
    layout_read = layout_beside(folder)
    assert (layout_read.version, layout_read.day) == (1, then)
    assert layout_read.encode_prompt(layout_read.prompt("Why?")) == layout.encode_prompt(layout.prompt("Why?"))
    make_contract(recipe, layout_of(recipe, Tokenizer(folder)), folder).write(folder)
    assert layout_beside(folder).prompt("Why?").startswith("01 January 2025\n")  # new ones name theirs
    rewrite(folder, date="2024-12-31")
    with pytest.raises(ContractError, match="gets other token ids here than in training"):
        layout_beside(folder)


def test_control_tokens_that_texts_mean_are_in_the_contract(tiny_model: Path) -> None:
    recipe = recipe_of(tiny_model)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"control_tokens": ("<|im_end|>",)})})
    contract = make_contract(recipe, layout_of(recipe, Tokenizer(tiny_model)), tiny_model)
    assert contract.control_tokens == ("<|im_end|>",)
    assert layout_under(contract, Tokenizer(tiny_model)).encode_answers(["<|im_end|>"]) == [[2]]
    assert identity(recipe)["data.control_tokens"] == ["<|im_end|>"]
    assert "data.control_tokens" not in identity(recipe_of(tiny_model))  # an old run keeps its identity
