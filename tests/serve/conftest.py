"""A tiny model with its prompt contract, and a running endpoint over it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from apprentice.data.contract import layout_of, make_contract
from apprentice.recipe import Recipe, Serving
from apprentice.serve.deployment import Endpoint, start
from apprentice.tokenizer import Tokenizer

RUNNING, QUEUED = 16, 4  # what the endpoint of the tests takes at once


def with_contract(model: Path, folder: Path, layout: str) -> Path:
    """A copy of `model` at `folder`, with the contract of a run in `layout`."""
    shutil.copytree(model, folder)
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"base": str(model)},
            "data": {"tasks": ["anything"], "layout": layout},
            "training": {"steps": 1},
        }
    )
    make_contract(recipe, layout_of(recipe, Tokenizer(folder)), folder, run="tiny").write(folder)
    return folder


@pytest.fixture(scope="session")
def chat_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_contract(tiny_model, tmp_path_factory.mktemp("chat") / "model", "chat")


@pytest.fixture(scope="session")
def plain_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_contract(tiny_model, tmp_path_factory.mktemp("plain") / "model", "plain")


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, chat_model: Path) -> Iterator[Endpoint]:
    """An endpoint in fp32 with one CPU, for a module's tests; one at a time in a Ray cluster."""
    serving = Serving(port=0, max_running=RUNNING, max_queued_requests=QUEUED, context=2048)
    with start(chat_model, serving, model_name="tiny", dtype="float32", cpus=1) as running:
        yield running
