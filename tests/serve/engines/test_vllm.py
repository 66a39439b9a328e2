"""vLLM behind our protocol and our ingress, held against our own engine; runs in the environment that `make vllm` makes.

All in float32, where both say the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import pytest_asyncio
import torch

from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.errors import ModelError
from apprentice.inference.generation_request import GeneratedToken, GenerationRequest, Sampling
from apprentice.models.loading import load_model
from apprentice.recipe import Serving
from apprentice.serve.api.schemas.requests import CompletionRequest
from apprentice.serve.deployment import Endpoint, start
from apprentice.serve.engines.base import Engine, EngineFailed, Overloaded
from apprentice.serve.engines.transformers import TransformersEngine
from apprentice.serve.generation.grammar import GrammarCompiler
from tests.models.adapters import random_lora

pytest.importorskip("vllm", reason="needs the vllm environment (make vllm)")
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]
LIMITS: dict[str, Any] = {"dtype": "float32", "max_running": 4, "max_queued": 2, "context": 600, "threads": 1}
PROMPTS = [tuple(range(3, 3 + length)) for length in (1, 30, 9, 200)]
WORDS = {"model": "tiny", "temperature": 0.0}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(chat_model: Path) -> AsyncIterator[Engine]:
    from apprentice.serve.engines.vllm import VllmEngine

    running = VllmEngine(chat_model, **LIMITS, adapters=2)
    yield running
    running.close()


@pytest.fixture(scope="module")
def own(chat_model: Path) -> Iterator[Engine]:
    running = TransformersEngine(chat_model, **LIMITS)
    yield running
    running.close()


async def reply(engine: Engine, request: GenerationRequest) -> list[GeneratedToken]:
    (stream,) = engine.generate([request])
    try:
        return [token._replace(key=0, reused=0) async for tokens in stream for token in tokens]  # which depends on what came before
    finally:
        stream.close()


async def settled(engine: Engine) -> None:
    async with asyncio.timeout(10):
        while engine.stats().running or engine.stats().queued:
            await asyncio.sleep(0.005)


def ids(tokens: Sequence[GeneratedToken]) -> list[int]:
    return [token.id for token in tokens]


async def test_replies_are_those_of_our_own_engine_alone_and_together(engine: Engine, own: Engine) -> None:
    requests = [GenerationRequest(prompt, 15, frozenset({2})) for prompt in PROMPTS]
    before = engine.stats()
    together = await asyncio.gather(*(reply(engine, request) for request in requests))
    assert [await reply(engine, request) for request in requests] == together
    assert [await reply(own, request) for request in requests] == together
    await settled(engine)
    after = engine.stats()
    assert after.requests - before.requests == 8
    assert after.tokens - before.tokens == 2 * sum(map(len, together))
    assert after.prompt_tokens - before.prompt_tokens == 2 * sum(map(len, PROMPTS))
    assert (after.running, after.queued, after.kv_use) == (0, 0, 0.0)
    assert after.kv_tokens >= 4 * 600


async def test_a_reply_ends_with_the_context(engine: Engine) -> None:
    assert engine.context == 600
    tokens = await reply(engine, GenerationRequest(tuple(range(3, 400)) + tuple(range(3, 193)), 100))
    assert [token.finish for token in tokens] == [None] * 12 + ["length"]


async def test_scores_are_those_of_our_own_engine(engine: Engine, own: Engine) -> None:
    request = GenerationRequest(PROMPTS[2], 5, logprobs=3, score_from=0)
    theirs, ours = await reply(engine, request), await reply(own, request)
    mine = [*ours[0].prompt_scores, *(token.score for token in ours)]
    others = [*theirs[0].prompt_scores, *(token.score for token in theirs)]
    assert len(mine) == len(others) == 14
    assert others[0] == mine[0] == (3, None, ())
    for one, other in zip(mine[1:], others[1:], strict=True):
        assert one is not None
        assert other is not None
        assert other.id == one.id
        assert other.logprob == pytest.approx(one.logprob, abs=1e-3)
        assert dict(other.top) == pytest.approx(dict(one.top), abs=1e-3)
        assert len(other.top) == 3
    (alone,) = await reply(engine, GenerationRequest(PROMPTS[2], 1, logprobs=0, score_from=7))
    assert [score.id for score in alone.prompt_scores] == [10, 11]


async def test_a_request_says_how_it_is_sampled(engine: Engine) -> None:
    drawn = [ids(await reply(engine, GenerationRequest((5, 6), 20, sampling=Sampling(1.0, seed=seed)))) for seed in (7, 7, 8, -3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(one) for one in drawn}) == 3
    assert ids(await reply(engine, GenerationRequest((5, 6), 4, sampling=Sampling(bias={77: 100.0})))) == [77] * 4
    penalties = Sampling(presence_penalty=2.0, frequency_penalty=2.0)
    assert len(set(ids(await reply(engine, GenerationRequest((5, 6), 30, sampling=penalties))))) > 20


async def test_a_form_is_followed(engine: Engine, chat_model: Path) -> None:
    layout = layout_beside(chat_model)
    grammars = GrammarCompiler(layout)
    wishes: list[dict[str, Any]] = [
        {"choice": ['yes ::= "no"', "maybe"]},
        {"regex": "[a-c]{3}x"},
        {"json": {"enum": ["red", 7]}},
    ]
    texts = []
    for wish in wishes:
        completion = CompletionRequest.model_validate(WORDS | {"prompt": "x", "structured_outputs": wish})
        form = grammars.compile(grammars.grammar_of(completion))
        tokens = await reply(engine, GenerationRequest((5, 6), 60, frozenset(layout.stop_ids), constraint=form))
        texts.append(layout.tokenizer.decode([token.id for token in tokens if token.finish != "stop"]))
    assert texts[0] in wishes[0]["choice"]
    assert len(texts[1]) == 4
    assert texts[1][-1] == "x"
    assert json.loads(texts[2]) in ("red", 7)


async def test_an_adapter_speaks_as_with_our_own_engine(engine: Engine, own: Engine, chat_model: Path, tmp_path: Path) -> None:
    model = load_model(chat_model, torch.float32)
    folders = [random_lora(model, tmp_path / str(seed), seed) for seed in (1, 2)]
    theirs = [None, *[await asyncio.to_thread(engine.load_adapter, folder) for folder in folders]]
    ours = [None, *[own.load_adapter(folder) for folder in folders]]

    def requests_for(adapters: Sequence[Any]) -> list[GenerationRequest]:
        return [GenerationRequest(PROMPTS[1], 12, adapter=adapter) for adapter in adapters]

    together = await asyncio.gather(*(reply(engine, request) for request in requests_for(theirs)))
    assert together == [await reply(own, request) for request in requests_for(ours)]
    assert len({tuple(ids(tokens)) for tokens in together}) == 3
    last = theirs[1:]
    for seed in range(3, 6):  # each takes the place of one that nobody has any more
        del theirs[:], last[:1]
        folder = random_lora(model, tmp_path / str(seed), seed)
        last.append(await asyncio.to_thread(engine.load_adapter, folder))
        pair = await asyncio.gather(*(reply(engine, request) for request in requests_for([None, *last])))
        assert pair[0] == together[0]
        assert pair[-1] == await reply(own, requests_for([own.load_adapter(folder)])[0])


async def test_an_adapter_that_vllm_cannot_put_on_is_refused(engine: Engine, chat_model: Path, tmp_path: Path) -> None:
    model = load_model(chat_model, torch.float32)
    wrong = {
        "has rank 65, and with vLLM at most 64 fits": random_lora(model, tmp_path / "wide", 1, rank=65),
        "ranks or scales of its own": random_lora(model, tmp_path / "own", 1, alpha_pattern={"q_proj": 3}),
        "is IA3, and only LoRA": random_lora(model, tmp_path / "kind", 1, peft_type="IA3"),
    }
    for reason, folder in wrong.items():
        with pytest.raises(ModelError, match=reason):
            await asyncio.to_thread(engine.load_adapter, folder)
    assert len(await reply(engine, GenerationRequest((5, 6), 3))) == 3


async def test_a_reply_that_is_given_up_makes_room(engine: Engine) -> None:
    streams = engine.generate([GenerationRequest((5, 6, number), 500) for number in range(6)])
    assert (await anext(streams[0]))[0].finish is None
    with pytest.raises(Overloaded):
        engine.generate([GenerationRequest((5, 6), 1)])
    assert engine.stats().running + engine.stats().queued == 6
    for stream in (*streams, streams[0]):
        stream.close()
    await settled(engine)
    assert len(await reply(engine, GenerationRequest((5, 6), 1))) == 1


async def test_a_closed_engine_fails_what_is_under_way(chat_model: Path) -> None:
    from apprentice.serve.engines.vllm import VllmEngine

    running = VllmEngine(chat_model, **LIMITS)
    task = asyncio.create_task(reply(running, GenerationRequest((5, 6), 500)))
    while not running.stats().tokens:
        await asyncio.sleep(0.005)
    running.close()
    with pytest.raises(EngineFailed, match="the engine was closed"):
        await task
    with pytest.raises(EngineFailed, match="the engine was closed"):
        running.check()


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, chat_model: Path, adapters: Path) -> Iterator[Endpoint]:
    serving = Serving(port=0, engine="vllm", max_running=4, max_queued_requests=2, context=600, adapters=str(adapters))
    with start(chat_model, serving, model_name="tiny", dtype="float32", cpus=1) as running:
        yield running


async def test_the_endpoint_is_the_same_over_vllm(endpoint: Endpoint, own: Engine, chat_model: Path) -> None:
    def ask() -> None:
        with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0) as client:
            assert {model.id for model in client.models.list()} == {"tiny", "rhymes"}
            said = [{"role": "user", "content": "Is this the film?"}]
            whole = client.chat.completions.create(messages=said, max_tokens=12, **WORDS)  # type: ignore[call-overload]
            with client.chat.completions.create(messages=said, max_tokens=12, stream=True, **WORDS) as stream:  # type: ignore[call-overload]
                pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
            assert "".join(pieces) == whole.choices[0].message.content
            other = client.chat.completions.create(messages=said, max_tokens=12, model="rhymes", temperature=0.0)  # type: ignore[call-overload]
            assert other.choices[0].message.content != whole.choices[0].message.content

    await asyncio.to_thread(ask)
    async with httpx.AsyncClient(base_url=endpoint.url, timeout=60) as http:
        answer = (await http.post("/v1/tasks/sst2", json={"fields": {"sentence": "A delight."}})).json()
        assert sum(choice["probability"] for choice in answer["choices"]) == pytest.approx(1.0)
        question = {"instruction": "Is this the film?", "max_tokens": 400, "ignore_eos": True}
        statuses = [one.status_code for one in await asyncio.gather(*(http.post("/v1/instruct", json=question) for _ in range(12)))]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 6


async def test_a_killed_replica_leaves_no_process_of_vllm(endpoint: Endpoint) -> None:
    def replicas() -> list[psutil.Process]:
        return [process for process in psutil.process_iter(["cmdline"]) if "ServeReplica:apprentice:apprentice" in _name(process)]

    (replica,) = replicas()
    below = replica.children(recursive=True)
    assert len(below) >= 2
    os.kill(replica.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in below):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)


def _name(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or [])
