"""Many adapters behind one endpoint: named by `model`, loaded when asked for, given up for others, refused over another base."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
import yaml

from apprentice.data.encoding.prompt_contract import layout_beside, layout_of, make_contract
from apprentice.errors import StorageError
from apprentice.inference.decoding import generate
from apprentice.models.loading import load_model
from apprentice.recipe import Recipe, Serving
from apprentice.run.contract import read_contract, weights_sha256
from apprentice.serve.api.application import build_app
from apprentice.serve.api.limits.api_keys import ApiKeys, new_key
from apprentice.serve.api.schemas.problems import RequestProblem
from apprentice.serve.engines.transformers import TransformersEngine
from apprentice.serve.generation import adapters as module
from apprentice.serve.generation.adapters import AdapterCache, list_adapters
from apprentice.serve.generation.served_models import Catalogue, ServedModel
from apprentice.storage import Folder
from tests.models.adapters import merged, random_lora
from tests.serve.conftest import Counted

pytestmark = pytest.mark.asyncio
ASKED = {"instruction": "Is this the film?", "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}


def contract_into(folder: Path, model: Path, layout: str, base_sha256: str) -> None:
    """What training writes beside an adapter."""
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"base": str(model)},
            "data": {"tasks": ["anything"], "layout": layout},
            "training": {"steps": 1},
        }
    )
    spoken = layout_of(recipe, layout_beside(model).tokenizer)
    make_contract(recipe, spoken, folder, run=folder.name, base_sha256=base_sha256).write(folder)


@pytest.fixture
def folder(chat_model: Path, tmp_path: Path) -> Path:
    """`a` and `b` as PEFT writes them, `run` as a run has it (in a layout of its own), `alien` of another base; and no adapters."""
    model = load_model(chat_model, torch.float32)
    place = tmp_path / "adapters"
    for seed, name in enumerate(("a", "b", "run/adapter", "alien"), start=1):
        random_lora(model, place / name, seed)
    contract_into(place / "run" / "adapter", chat_model, "plain", weights_sha256(chat_model))
    contract_into(place / "alien", chat_model, "chat", "0" * 64)
    (place / "empty").mkdir()
    random_lora(model, tmp_path / "outside", 9)
    return place


@pytest_asyncio.fixture
async def engine(chat_model: Path) -> AsyncIterator[TransformersEngine]:
    running = TransformersEngine(chat_model, dtype="float32", max_running=8, max_queued=16, context=512, threads=1)
    yield running
    await asyncio.to_thread(running.close)


def served(engine: TransformersEngine, model: Path, folder: str | Path, most: int = 2, waiting: int = 8) -> Catalogue:
    base = ServedModel("base", engine, layout_beside(model), read_contract(model))
    return Catalogue([base], AdapterCache(Folder.at(folder), base, weights_sha256(model), most=most, most_waiting=waiting))


def client(catalogue: Catalogue, **more: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(build_app(catalogue, **more), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)


async def ids(http: httpx.AsyncClient, model: str | None = None) -> list[int]:
    response = await http.post("/v1/instruct", json=ASKED | ({"model": model} if model else {}))
    assert response.status_code == 200, response.text
    return list(response.json()["choices"][0]["token_ids"])


async def test_model_names_an_adapter(engine: TransformersEngine, chat_model: Path, folder: Path, counted: Counted) -> None:
    async with client(served(engine, chat_model, folder)) as http:
        listed = (await http.get("/v1/models")).json()["data"]
        assert [(model["id"], model.get("parent")) for model in listed] == [
            ("base", None),
            *((name, "base") for name in ("a", "alien", "b", "run")),
        ]
        names = [None, "a", "b", "run"]
        together = await asyncio.gather(*(ids(http, name) for name in names * 3))
        assert together[:4] * 2 == together[4:]
        assert [await ids(http, name) for name in names] == together[:4]
        bare = load_model(chat_model, torch.float32)
        for name, reply in zip(names, together, strict=False):
            model = merged(bare, folder / name.replace("run", "run/adapter")) if name else bare
            seen = (await http.post("/v1/render", json={"instruction": ASKED["instruction"], "model": name})).json()
            assert generate(model, [seen["token_ids"]], max_new_tokens=8, stop_ids=()) == [reply]
        # Each is spoken to as it was trained.
        layouts = [(await http.get("/v1/contract", params={"model": name})).json()["layout"] for name in ("base", "a", "run")]
        assert layouts == ["chat", "chat", "plain"]
        assert counted("apprentice_requests", model="a", status="200") == 4
    assert len({tuple(reply) for reply in together}) == 4


async def test_what_is_not_there_or_not_of_this_base_is_refused(engine: TransformersEngine, chat_model: Path, folder: Path) -> None:
    async with client(served(engine, chat_model, folder)) as http:

        async def refusal(model: str) -> tuple[int, str]:
            response = await http.post("/v1/instruct", json=ASKED | {"model": model})
            return response.status_code, response.json()["error"]["message"]

        real = weights_sha256(chat_model)[:12]
        for _ in range(2):
            assert await refusal("alien") == (
                400,
                f"adapter 'alien' was trained on other weights ({chat_model}, sha256 000000000000) than are served here"
                f" (sha256 {real}); serve it over its own base.",
            )
        for trick in ("../outside", "..", ".", "", "a/../b", "/etc", str(folder.parent / "outside"), "run/adapter", "empty", "a\0"):
            status, message = await refusal(trick)
            assert (status, "is not served here" in message) == (404, True), trick
        assert (await http.get("/v1/models/..%2Foutside")).status_code == 404
        (folder / "b" / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
        only = "the adapter in 'b' is PREFIX_TUNING, and only LoRA shares a base with others; serve its run alone."
        assert await refusal("b") == (400, only)
        assert len(await ids(http, "a")) == 8


async def test_adapters_come_go_and_change_without_a_restart(
    engine: TransformersEngine, chat_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FRESH_S", 0.0)
    monkeypatch.setattr(module, "_AGAIN_S", 0.0)
    async with client(served(engine, chat_model, folder)) as http:
        first, other = await ids(http, "a"), await ids(http, "b")
        shutil.copytree(folder / "b", folder / "new")
        assert await ids(http, "new") == other
        shutil.rmtree(folder / "b")
        assert (await http.post("/v1/instruct", json=ASKED | {"model": "b"})).status_code == 404
        shutil.copytree(folder / "a", folder / "b")
        assert await ids(http, "b") == first
        shutil.rmtree(folder / "a")
        shutil.copytree(folder / "new", folder / "a")
        os.utime(folder / "a" / "adapter_model.safetensors", ns=(1, 1))  # copied files keep their time
        assert await ids(http, "a") == other
        shutil.rmtree(folder)
        assert await ids(http, "a") == other  # a listing that fails leaves the last one standing


async def test_no_more_are_in_memory_than_allowed(engine: TransformersEngine, chat_model: Path, folder: Path) -> None:
    catalogue = served(engine, chat_model, folder, most=1, waiting=2)
    lease = await catalogue.take("a")
    waiting = [asyncio.create_task(catalogue.take(name)) for name in ("b", "a")]
    await asyncio.sleep(0.1)
    assert [task.done() for task in waiting] == [
        False,
        True,
    ]  # b has no place while a is in use, and a, in memory, waits for nobody
    (await waiting[1]).release()
    waiting.append(asyncio.create_task(catalogue.take("run")))
    await asyncio.sleep(0)
    async with client(catalogue) as http:
        full = await http.post("/v1/instruct", json=ASKED | {"model": "b"})
        assert (full.status_code, full.json()["error"]["code"]) == (429, "overloaded")
        assert len(await ids(http)) == 8  # the base waits for nobody
        assert len(await ids(http, "a")) == 8
    lease.release()
    lease.release()
    leased = await waiting[0]
    assert (leased.model.name, waiting[2].done()) == ("b", False)
    waiting[2].cancel()
    await asyncio.gather(waiting[2], return_exceptions=True)
    leased.release()
    again = await asyncio.wait_for(catalogue.take("a"), 10)
    assert again.model is not lease.model  # it had to be read again
    again.release()
    with await catalogue.take("a") as model:
        assert model is again.model


async def test_an_adapter_that_was_put_out_leaves_the_memory(engine: TransformersEngine, chat_model: Path, folder: Path) -> None:
    catalogue = served(engine, chat_model, folder, most=1)
    async with client(catalogue) as http:
        assert len(await ids(http, "a")) == 8
        with await catalogue.take("a") as model:
            reference = weakref.ref(model)
        del model
        assert len(await ids(http, "b")) == 8
        gc.collect()
        assert reference() is None


async def test_who_needs_a_place_gets_one_though_all_adapters_are_busy(
    engine: TransformersEngine, chat_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users of `a` and `b` come and go without a pause; the one that was not asked for the longest takes no new ones."""
    monkeypatch.setattr(module, "_PATIENCE_S", 0.05)
    catalogue = served(engine, chat_model, folder, most=2)
    stopped = asyncio.Event()

    async def busy(name: str) -> None:
        while not stopped.is_set():
            mine = await catalogue.take(name)
            await asyncio.sleep(0.01)
            following = asyncio.create_task(catalogue.take(name))  # before the first has left
            await asyncio.sleep(0)
            mine.release()
            (await following).release()

    leases = [await catalogue.take("a"), await catalogue.take("b")]
    crowds = [asyncio.create_task(busy(name)) for name in ("a", "a", "b", "b")]
    await asyncio.sleep(0)
    for lease in leases:
        lease.release()
    async with asyncio.timeout(10):
        (await catalogue.take("run")).release()
    stopped.set()
    await asyncio.gather(*crowds)


async def test_the_time_of_a_request_holds_while_it_waits_for_an_adapter(
    engine: TransformersEngine, chat_model: Path, folder: Path
) -> None:
    catalogue = served(engine, chat_model, folder, most=1)
    lease = await catalogue.take("a")
    async with client(catalogue, serving=Serving(request_timeout_s=0.1)) as http:
        late = await http.post("/v1/instruct", json=ASKED | {"model": "b"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "request_timeout")
    lease.release()
    async with client(catalogue) as http:
        assert len(await ids(http, "b")) == 8


async def test_a_store_that_does_not_answer_once_refuses_nothing_for_good(
    engine: TransformersEngine, chat_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = served(engine, chat_model, folder)
    attempts: list[str] = []
    layout_over = module.layout_over

    def twice_down(name: str, *more: Any) -> Any:
        attempts.append(name)
        if len(attempts) < 3:
            raise StorageError("the store does not answer (503).") if len(attempts) == 1 else OSError("connection reset")
        return layout_over(name, *more)

    monkeypatch.setattr(module, "layout_over", twice_down)
    async with client(catalogue) as http:
        for _ in range(2):
            down = await http.post("/v1/instruct", json=ASKED | {"model": "a"})
            assert (down.status_code, down.json()["error"]["code"]) == (503, "adapter_unreachable")
            assert down.headers["retry-after"] == "1"
        assert len(await ids(http, "a")) == 8
    # What is refused for good is told anew each time: an error that is raised again grows by a traceback.
    refusals = []
    for _ in range(2):
        with pytest.raises(RequestProblem) as refusal:
            await catalogue.take("alien")
        refusals.append(refusal.value)
    assert refusals[0] is not refusals[1]
    assert attempts.count("alien") == 1


async def test_a_folder_that_cannot_be_listed_yet_is_no_empty_one(
    engine: TransformersEngine, chat_model: Path, tmp_path: Path
) -> None:
    async with client(served(engine, chat_model, tmp_path / "later")) as http:
        answer = await http.post("/v1/instruct", json=ASKED | {"model": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "adapter_unreachable")
        assert len(await ids(http)) == 8


async def test_keys_hold_for_adapters(engine: TransformersEngine, chat_model: Path, folder: Path, tmp_path: Path) -> None:
    key, entry = new_key("anna")
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump({"keys": [yaml.safe_load(entry)[0] | {"models": ["a"]}]}))
    async with client(served(engine, chat_model, folder), keys=ApiKeys(file)) as http:
        http.headers["Authorization"] = f"Bearer {key}"
        assert [model["id"] for model in (await http.get("/v1/models")).json()["data"]] == ["a"]
        assert len(await ids(http, "a")) == 8
        for name in ("b", "base", None, "none"):
            response = await http.post("/v1/instruct", json=ASKED | ({"model": name} if name else {}))
            assert (response.status_code, response.json()["error"]["code"]) == (403, "model_not_allowed")
        for path in ("/v1/contract", "/v1/models/b"):
            assert (await http.get(path)).status_code == 403


async def test_two_models_with_engines_of_their_own(engine: TransformersEngine, chat_model: Path, plain_model: Path) -> None:
    other = TransformersEngine(plain_model, dtype="float32", max_running=2, max_queued=2, context=100, threads=1)
    models = [ServedModel("tuned", engine, layout_beside(chat_model)), ServedModel("base", other, layout_beside(plain_model))]
    async with client(Catalogue(models)) as http:
        assert [model["id"] for model in (await http.get("/v1/models")).json()["data"]] == ["tuned", "base"]
        for name, layout in (("tuned", "chat"), ("base", "plain")):
            seen = (await http.post("/v1/render", json={"instruction": "Name it.", "model": name})).json()
            assert ("<|im_start|>" in seen["text"]) == (layout == "chat")
        assert len(await ids(http, "base")) == 8
        assert (await http.post("/v1/instruct", json=ASKED | {"model": "base", "max_tokens": 99})).status_code == 400
        await http.get("/ready")
        async with asyncio.timeout(10):
            while (await http.get("/ready")).status_code != 200:
                await asyncio.sleep(0.01)
        assert (await http.get("/stats", params={"model": "base"})).json()["requests"] == 2
    other.close()


async def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be listed"):
        list_adapters(Folder.at(tmp_path / "none"))
    assert list_adapters(Folder.at(tmp_path)) == {}
