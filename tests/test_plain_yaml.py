"""YAML with bounds: small files that would take minutes, gigabytes or foreign exceptions are refused with the place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from apprentice.errors import ApprenticeError
from apprentice.plain_yaml import MAX_NODES, load_yaml
from apprentice.recipe import load_recipe
from apprentice.serve.api.limits.api_keys import ApiKeys
from apprentice.tasks.registry import load_task

MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
HOSTILE = {
    "merge keys": (MERGES, "values, those behind aliases and merge keys"),
    "aliases": (LAUGHS, "values, those behind aliases and merge keys"),
    "brackets": ("a: " + "[" * 3000 + "]" * 3000, "nested more than 64 deep"),
    "mappings": ("a: " + "{b: " * 3000 + "}" * 3000, "nested more than 64 deep"),
    "digits": ("a: " + "9" * 100_000, "a number of more than 100 digits"),
    "hexadecimal": ("a: 0x" + "f" * 100_000, "a number of more than 100 digits"),
    "sixties": ("a: 1" + ":59" * 50_000, "a number of more than 100 digits"),
    "a key of digits": ("? " + "9" * 100_000 + "\n: 1", "a number of more than 100 digits"),
    "itself": ("a: &a [*a]", "an alias that holds itself"),
    "no date": ("a: 2026-99-99", "none of its kind"),
    "many": ("[" + "1, " * (MAX_NODES + 1) + "]", "more than 100,000 values"),
}


@pytest.mark.parametrize(("text", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_beyond_a_bound_is_refused(text: str, reason: str) -> None:
    with pytest.raises(yaml.YAMLError, match=reason):
        load_yaml(text)


def test_ordinary_files_are_read_as_pyyaml_reads_them() -> None:
    text = "a: &a {b: 1, c: [0x1f, 1.5, 1e3, yes, null, 2026-11-30]}\nd: {<<: *a, e: *a}\nlong: '" + "9" * 500 + "'\n"
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("text", [text for name, (text, _) in HOSTILE.items() if name != "many"])  # that one takes seconds to read
def test_recipes_tasks_and_keys_are_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    with pytest.raises(ApprenticeError, match=r"file\.yaml"):
        load_recipe(file)
    with pytest.raises(ApprenticeError, match=r"file\.yaml"):
        load_task(file)
    with pytest.raises(ApprenticeError, match=r"file\.yaml"):
        ApiKeys(file)


def test_an_override_is_bounded_too(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("name: r\n")
    with pytest.raises(ApprenticeError, match="a number of more than 100 digits"):
        load_recipe(file, ["seed=" + "9" * 5000])
