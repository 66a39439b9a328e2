"""The engine's thread: joins, leaves, refuses, fails; one model, no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from apprentice.serve.engine import EngineFailed, NewToken, Overloaded, Request
from apprentice.serve.transformers_engine import TransformersEngine

pytestmark = pytest.mark.asyncio


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[TransformersEngine]:
    running = TransformersEngine(tiny_model, dtype="float32", max_running=2, max_queued=1, context=3000, threads=1)
    yield running
    running.close()


async def reply(engine: TransformersEngine, request: Request) -> list[NewToken]:
    (stream,) = engine.generate([request])
    try:
        return [token async for tokens in stream for token in tokens]
    finally:
        stream.close()


async def settled(engine: TransformersEngine) -> None:
    """Waits until nobody has a slot."""
    async with asyncio.timeout(10):
        while engine.stats().running or engine.stats().queued:
            await asyncio.sleep(0.005)


async def test_replies_are_the_same_in_company(engine: TransformersEngine) -> None:
    requests = [Request(tuple(range(3, 3 + length)), 15) for length in (2, 30, 9)]
    together = await asyncio.gather(*(reply(engine, request) for request in requests))
    assert [await reply(engine, request) for request in requests] == together
    assert [[token.finish for token in tokens] for tokens in together] == [[None] * 14 + ["length"]] * 3
    await settled(engine)
    assert engine.stats()[:4] == (0, 0, 6, 90)


async def test_a_reply_that_is_given_up_frees_its_slot(engine: TransformersEngine) -> None:
    (stream,) = engine.generate([Request((5, 6), 2000)])
    assert (await anext(stream))[0].finish is None
    assert engine.stats().running == 1
    stream.close()
    stream.close()
    await settled(engine)
    waiting = asyncio.create_task(reply(engine, Request((5, 6), 2000)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await settled(engine)
    assert engine.stats().tokens < 1000


async def test_more_than_running_and_queued_is_overload(engine: TransformersEngine) -> None:
    tasks = [asyncio.create_task(reply(engine, Request((5, 6), 2000))) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await reply(engine, Request((5, 6), 1))
    with pytest.raises(Overloaded):
        engine.generate([Request((5, 6), 1)] * 2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await settled(engine)
    assert len(await reply(engine, Request((5, 6), 1))) == 1


async def test_a_failure_reaches_everybody(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory() -> list[NewToken]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._decoder, "step", out_of_memory)
    engine.check()
    with pytest.raises(EngineFailed, match="RuntimeError: out of memory"):
        await reply(engine, Request((5, 6), 5))
    with pytest.raises(EngineFailed, match="out of memory"):
        engine.check()
    with pytest.raises(EngineFailed, match="out of memory"):
        await reply(engine, Request((5, 6), 5))


async def test_a_closed_engine_fails_what_is_under_way(engine: TransformersEngine) -> None:
    task = asyncio.create_task(reply(engine, Request((5, 6), 2000)))
    while not engine.stats().tokens:
        await asyncio.sleep(0.005)
    await asyncio.to_thread(engine.close)
    with pytest.raises(EngineFailed, match="the engine was closed"):
        await task
