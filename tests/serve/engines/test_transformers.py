"""The engine's thread: joins, leaves, refuses, fails; one model, no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apprentice.errors import ModelError
from apprentice.inference.generation_request import GeneratedToken, GenerationRequest
from apprentice.inference.lora import LoraLayers
from apprentice.serve.engines.base import EngineFailed, Overloaded, RequestFailed
from apprentice.serve.engines.transformers import TransformersEngine
from tests.models.adapters import random_lora

pytestmark = pytest.mark.asyncio


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[TransformersEngine]:
    running = TransformersEngine(tiny_model, dtype="float32", max_running=2, max_queued=1, context=3000, threads=1)
    yield running
    running.close()


async def reply(engine: TransformersEngine, request: GenerationRequest) -> list[GeneratedToken]:
    (stream,) = engine.generate([request])
    try:
        return [token._replace(key=0) async for tokens in stream for token in tokens]
    finally:
        stream.close()


async def settled(engine: TransformersEngine) -> None:
    """Waits until nobody has a slot."""
    async with asyncio.timeout(10):
        while engine.stats().running or engine.stats().queued:
            await asyncio.sleep(0.005)


async def test_replies_are_the_same_in_company(engine: TransformersEngine) -> None:
    requests = [GenerationRequest(tuple(range(3, 3 + length)), 15) for length in (2, 30, 9)]
    together = await asyncio.gather(*(reply(engine, request) for request in requests))
    alone = [await reply(engine, request) for request in requests]
    assert [[token._replace(reused=0) for token in tokens] for tokens in alone] == together
    assert [[token.finish for token in tokens] for tokens in together] == [[None] * 14 + ["length"]] * 3
    await settled(engine)
    assert engine.stats()[:4] == (0, 0, 6, 90)


async def test_a_reply_that_is_given_up_frees_its_slot(engine: TransformersEngine) -> None:
    (stream,) = engine.generate([GenerationRequest((5, 6), 2000)])
    assert (await anext(stream))[0].finish is None
    assert engine.stats().running == 1
    stream.close()
    stream.close()
    await settled(engine)
    waiting = asyncio.create_task(reply(engine, GenerationRequest((5, 6), 2000)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await settled(engine)
    assert engine.stats().tokens < 1000


async def test_memory_is_free_once_a_client_has_left(engine: TransformersEngine) -> None:
    (stream,) = engine.generate([GenerationRequest((5, 6), 2000)])
    assert (await anext(stream))[0].finish is None
    assert engine.stats().kv_reserved > 0
    stream.close()
    async with asyncio.timeout(10):
        while engine.stats().kv_use or engine.stats().kv_reserved:
            await asyncio.sleep(0.005)


async def test_the_first_token_says_what_was_in_memory(engine: TransformersEngine) -> None:
    prompt = tuple(range(3, 103))
    first, second = [await reply(engine, GenerationRequest(prompt, 3)) for _ in range(2)]
    assert [token.reused for token in first] == [0, 0, 0]
    assert [token.reused for token in second] == [99, 0, 0]


async def test_more_than_running_and_queued_is_overload(engine: TransformersEngine) -> None:
    tasks = [asyncio.create_task(reply(engine, GenerationRequest((5, 6), 2000))) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await reply(engine, GenerationRequest((5, 6), 1))
    with pytest.raises(Overloaded):
        engine.generate([GenerationRequest((5, 6), 1)] * 2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await settled(engine)
    assert len(await reply(engine, GenerationRequest((5, 6), 1))) == 1


async def test_a_failure_reaches_everybody(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory() -> list[GeneratedToken]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._scheduler, "step", out_of_memory)
    engine.check()
    with pytest.raises(EngineFailed, match="RuntimeError: out of memory"):
        await reply(engine, GenerationRequest((5, 6), 5))
    with pytest.raises(EngineFailed, match="out of memory"):
        engine.check()
    with pytest.raises(EngineFailed, match="out of memory"):
        await reply(engine, GenerationRequest((5, 6), 5))


async def test_a_closed_engine_fails_what_is_under_way(engine: TransformersEngine) -> None:
    task = asyncio.create_task(reply(engine, GenerationRequest((5, 6), 2000)))
    while not engine.stats().tokens:
        await asyncio.sleep(0.005)
    await asyncio.to_thread(engine.close)
    with pytest.raises(EngineFailed, match="the engine was closed"):
        await task


class _Broken:
    """A form that cannot be followed: from the start, or from the first token on."""

    def __init__(self, *, at_once: bool) -> None:
        self.at_once = at_once

    def allowed(self) -> Any:
        if self.at_once:
            raise ValueError("the grammar has no end")
        return np.ones(10**6, dtype=bool)

    def accept(self, id: int) -> None:
        raise ValueError("the grammar has no end")


async def test_a_request_that_cannot_be_decoded_fails_alone(engine: TransformersEngine) -> None:
    expected = await reply(engine, GenerationRequest((5, 6), 60))
    beside = asyncio.create_task(reply(engine, GenerationRequest((5, 6), 60)))
    for at_once in (True, False):
        with pytest.raises(RequestFailed, match="the grammar has no end"):
            await reply(engine, GenerationRequest((7, 8), 5, constraint=_Broken(at_once=at_once)))
    with pytest.raises(RequestFailed, match="3000 leaves no room for a reply"):
        await reply(engine, GenerationRequest((5,) * 3000, 1))
    engine.check()
    assert await beside == expected
    await settled(engine)


async def test_an_adapter_that_cannot_be_applied_is_refused_and_harms_nobody(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_lora(engine._model, tmp_path / "a", 1)
    expected = await reply(engine, GenerationRequest((5, 6), 60))
    beside = asyncio.create_task(reply(engine, GenerationRequest((5, 6), 60)))

    def other_rows(*_: Any) -> None:
        raise ModelError("'router' is computed for 6 rows of 3; this model takes no adapters here.")

    with monkeypatch.context() as patch:
        patch.setattr(LoraLayers, "_multiply", other_rows)
        with pytest.raises(ModelError, match=r"the adapter in .*a cannot be applied: 'router' is computed for 6 rows of 3"):
            await asyncio.to_thread(engine.load_adapter, folder)
    adapter = await asyncio.to_thread(engine.load_adapter, folder)
    assert await beside == expected
    assert len(await reply(engine, GenerationRequest((5, 6), 5, adapter=adapter))) == 5


async def test_a_request_that_comes_while_the_engine_fails_is_told_so(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder tells those in its table that it has failed; one that enters the table just then must not wait."""
    begin = engine._start

    def fails_meanwhile(request: GenerationRequest) -> Any:
        engine.close()
        return begin(request)

    monkeypatch.setattr(engine, "_start", fails_meanwhile)
    with pytest.raises(EngineFailed, match="the engine was closed"):
        async with asyncio.timeout(10):
            await reply(engine, GenerationRequest((5, 6), 5))
