"""A tiny model with its prompt contract, and a running endpoint over it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apprentice.data.encoding.prompt_contract import layout_of, make_contract
from apprentice.models.loading import load_model
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe, Serving
from apprentice.serve.api import request_metrics
from apprentice.serve.deployment import Endpoint, start
from apprentice.serve.replica import ModelSpec
from tests.models.adapters import random_lora

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


class Counted:
    """What was recorded of the endpoint's metrics, instead of in Ray: the values by metric and tags."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], list[float]] = {}

    def kind(self, name: str, *_: Any) -> Any:
        def record(value: float = 1.0, tags: dict[str, str] | None = None) -> None:
            self.values.setdefault((name, frozenset((tags or {}).items())), []).append(value)

        return SimpleNamespace(inc=record, set=record, observe=record)

    def __call__(self, name: str, **tags: str) -> int:
        """How often it was recorded."""
        return len(self.values.get((name, frozenset(tags.items())), []))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counts = Counted()
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(request_metrics.metrics, kind, counts.kind)
    return counts


@pytest.fixture(scope="session")
def chat_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_contract(tiny_model, tmp_path_factory.mktemp("chat") / "model", "chat")


@pytest.fixture(scope="session")
def plain_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_contract(tiny_model, tmp_path_factory.mktemp("plain") / "model", "plain")


@pytest.fixture(scope="session")
def t5_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 with the tiny model's tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5") / "bare"
    shutil.copytree(tiny_model, folder)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = T5Config(
            vocab_size=512, d_model=64, d_kv=32, d_ff=96, num_layers=2, num_heads=2, eos_token_id=2, decoder_start_token_id=0
        )
        T5ForConditionalGeneration(config).save_pretrained(folder)
    return with_contract(folder, folder.parent / "model", "plain")


@pytest.fixture(scope="session")
def adapters(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one adapter of the chat model, `rhymes`."""
    folder = tmp_path_factory.mktemp("adapters")
    random_lora(load_model(chat_model, torch.float32), folder / "rhymes", 7)
    return folder


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, chat_model: Path, t5_model: Path, adapters: Path) -> Iterator[Endpoint]:
    """An endpoint in fp32 with one CPU, for a module's tests; one at a time in a Ray cluster.

    It serves `tiny`, its adapter `rhymes`, and beside them `t5`.
    """
    serving = Serving(port=0, max_running=RUNNING, max_queued_requests=QUEUED, context=2048, adapters=str(adapters))
    others = [ModelSpec("t5", t5_model)]
    with start(chat_model, serving, model_name="tiny", dtype="float32", cpus=1, beside=others) as running:
        yield running
