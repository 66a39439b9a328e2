"""The committed reference is what the code says; whatever is shipped fits the JSON Schemas, and what is wrong does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from apprentice.cli import app
from apprentice.plain_yaml import load_yaml
from apprentice.recipe.recipe_file import shipped_recipes
from apprentice.tasks.registry import library
from docs.build import reference
from tests.conftest import ROOT

FILES = {"recipe": list(shipped_recipes().values()), "task": list(library().values())}


def validator(kind: str) -> Any:
    schema = json.loads((ROOT / "docs" / "reference" / f"{kind}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_committed_reference_is_what_the_code_says() -> None:
    made = reference.reference_files()
    old = [name for name, text in made.items() if (reference.FOLDER / name).read_text(encoding="utf-8") != text]
    assert old == [], "say `make reference`, or run docs/build/reference.py, and commit what it writes"
    assert {file.name for file in reference.FOLDER.iterdir()} == set(made)


@pytest.mark.parametrize("kind", ["recipe", "task"])
def test_what_is_shipped_fits_its_schema(kind: str) -> None:
    check = validator(kind)
    assert len(FILES[kind]) > 10
    wrong = {file: [fault.message for fault in check.iter_errors(json.loads(json.dumps(content_of(file))))] for file in FILES[kind]}
    assert {file: faults for file, faults in wrong.items() if faults} == {}


@pytest.mark.parametrize("kind", ["recipe", "task"])
def test_a_misspelt_key_does_not_fit(kind: str) -> None:
    content = json.loads(json.dumps(content_of(FILES[kind][0])))
    assert [fault.message for fault in validator(kind).iter_errors(content | {"nmae": "x"})]


@pytest.mark.parametrize("kind", ["recipe", "task"])
def test_the_command_prints_the_schema_that_its_page_tells_editors_of(kind: str) -> None:
    printed = CliRunner().invoke(app, [f"{kind}-schema"]).stdout
    assert printed == (ROOT / "docs" / "reference" / f"{kind}.schema.json").read_text()
    page = (ROOT / "docs" / "reference" / f"{kind}.md").read_text()
    assert f"apprentice {kind}-schema > {kind}.schema.json" in page
    assert f"# yaml-language-server: $schema={kind}.schema.json" in page


def content_of(file: Path) -> Any:
    return load_yaml(file.read_text(encoding="utf-8"))
