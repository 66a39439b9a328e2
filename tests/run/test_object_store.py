"""Runs in an object store: the pipeline with `storage=s3://…`, in processes that know the store by their environment alone."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from apprentice import pipeline
from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import ModelError, StorageError
from apprentice.inference.lora import read_lora
from apprentice.models.loading import load_model
from apprentice.pretrained import hub
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.run.contract import read_contract
from apprentice.run.folder import Run
from apprentice.serve.engines.transformers import TransformersEngine
from apprentice.serve.generation.adapters import AdapterCache, list_adapters
from apprentice.serve.generation.served_models import ModelLease, ServedModel
from apprentice.storage import Folder
from tests.models.adapters import random_lora
from tests.support.object_store import BUCKET, ObjectStore, object_store
from tests.support.recipes import tiny_recipe


@pytest.fixture
def store(monkeypatch, tmp_path) -> Iterator[ObjectStore]:
    with object_store() as running:
        for name, value in {**running.environment, "APPRENTICE_CACHE": str(tmp_path / "cache")}.items():
            monkeypatch.setenv(name, value)
        yield running


def test_folders_in_a_store(store, tmp_path):
    folder = Folder.at(f"s3://{BUCKET}/a")
    (folder / "b" / "one.txt").write_text("1")
    (folder / "big").write_bytes(bytes(range(256)) * 100_000)
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "x").write_text("x")
    (folder / "up").upload(tmp_path / "up")
    assert [child.name for child in folder.children()] == ["b", "big", "up"]
    assert (folder / "b" / "one.txt").read_text() == "1"
    assert (folder / "big").read_bytes() == bytes(range(256)) * 100_000
    assert (folder.download(tmp_path / "down") / "up" / "x").read_text() == "x"
    assert not (folder / "c").exists()
    with pytest.raises(StorageError, match=r"s3://bucket/a/c does not exist"):
        (folder / "c").read_bytes()
    folder.delete()
    assert [key for key in store.objects if key.startswith("a/b")] == []


def test_a_models_path_in_the_cache_says_where_it_came_from(store, tiny_model, tmp_path):
    place = f"s3://{BUCKET}/models/tiny"
    Folder.at(place).upload(tiny_model)
    here = hub.local_folder(place)
    assert here.is_relative_to(tmp_path / "cache")
    assert (here / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    here.rename(tmp_path / "gone")  # as on another node, which is told the path alone
    assert hub.local_folder(str(here)) == here
    assert (here / "config.json").is_file()


def test_new_weights_under_an_old_config_are_seen(store, tiny_model):
    place = Folder.at(f"s3://{BUCKET}/models/tiny")
    place.upload(tiny_model)
    before = hub.local_folder(str(place))
    (place / "gate.json").write_text("{}")  # a verdict, which comes later
    assert hub.local_folder(str(place)) == before
    weights = (tiny_model / "model.safetensors").read_bytes()[:-1] + b"x"  # as many bytes, within the same second
    (place / "model.safetensors").write_bytes(weights)
    after = hub.local_folder(str(place))
    assert after != before
    assert (after / "model.safetensors").read_bytes() == weights
    shutil.rmtree(before)  # as on another node, which is told the path of what is there no more
    with pytest.raises(ModelError, match=r"the model in s3://bucket/models/tiny is another one than when this began"):
        hub.local_folder(str(before))


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_the_road_with_its_storage_in_a_store(store, tiny_model, tmp_path):
    storage = f"s3://{BUCKET}/runs"
    recipe = tiny_recipe(tmp_path, tiny_model, storage=storage, training__steps=3, evaluation__gate={"held_out": -1000.0})
    done = run_pipeline(recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith(f"{storage}/tiny")
    keys = [key.removeprefix("runs/tiny/") for key in store.objects if key.startswith("runs/tiny/")]
    expected = {
        "recipe.yaml",
        "status.json",
        "ledger.json",
        "export.json",
        "model/apprentice.json",
        "report/report.html",
        "adapter/adapter_config.json",
    }
    assert expected <= set(keys)
    assert any(key.startswith("checkpoints/step-") for key in keys)
    assert not [place for place in (tmp_path / "runs", Path("s3:")) if place.exists()]

    again = run_pipeline(recipe)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "trained already" in again.stdout
    assert "evaluated already" in again.stdout
    assert store.secret not in done.stdout + done.stderr + again.stdout + again.stderr + str(store.objects)

    report, place = pipeline.rebuild_report(f"{storage}/tiny", "./runs")
    assert len(report["tasks"]) >= 8
    assert json.loads((place / "report.json").read_text())["summary"] == report["summary"]
    run = Run(Folder.at(f"{storage}/tiny"))
    folder = hub.local_folder(str(run.model))
    assert read_contract(folder) == read_contract(run.model)


def run_pipeline(recipe: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "apprentice.jobs", "pipeline", "--recipe", str(recipe)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=recipe.parent, env=environment)


def test_a_store_that_refuses_is_said_in_one_sentence(store, tiny_model, tmp_path, monkeypatch):
    from apprentice.preflight.check import run_check
    from apprentice.recipe import load_recipe

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    with pytest.raises(StorageError, match="Choose another `storage`") as caught:
        run_check("storage", load_recipe(tiny_recipe(tmp_path, tiny_model, storage=f"s3://{BUCKET}/runs")))
    assert store.secret not in str(caught.value)


def test_adapters_in_a_store_are_served(store, tiny_model, tmp_path):
    model = load_model(tiny_model, torch.float32)
    folder = random_lora(model, tmp_path / "adapter", 1)
    Folder.at(f"s3://{BUCKET}/adapters/anna").upload(folder)
    Folder.at(f"s3://{BUCKET}/adapters/runs/ben/adapter").upload(folder)
    assert list(list_adapters(Folder.at(f"s3://{BUCKET}/adapters/runs"))) == ["ben"]

    async def served() -> tuple[list[str], ServedModel, ModelLease | None]:
        engine = TransformersEngine(tiny_model, dtype="float32", max_running=1, max_queued=1, context=64, threads=1)
        base = ServedModel("base", engine, Layout("plain", Tokenizer(tiny_model)))
        adapters = AdapterCache(Folder.at(f"s3://{BUCKET}/adapters"), base, "0" * 64, most=1, most_waiting=1)
        names, lease, none = await adapters.names(), await adapters.take("anna"), await adapters.take("ben")
        await asyncio.to_thread(engine.close)
        return names, lease.model, none

    names, leased, none = asyncio.run(served())
    assert (names, leased.name, none) == (["anna"], "anna", None)
    here = read_lora(folder, model).layers
    assert leased.adapter.layers.keys() == here.keys()
    for name, matrices in leased.adapter.layers.items():
        assert all(torch.equal(one, other) for one, other in zip(matrices, here[name], strict=True))
